// SPDX-License-Identifier: BSD-3-Clause
// Where the sequences of a batch lie and how long they are.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fa {

// Rows [begin, begin + length) of the tensors of one batch entry.
struct Sequence {
  int begin;
  int length;
};

// Of queries or of keys, for a whole batch. Without pointers every sequence starts at row 0 of its
// batch entry and has the length of the tensor. With cu_seqlens the sequences are packed one after
// another in a single batch entry (the views then have batch_stride 0). Kernels trust what the
// pointers hold, and leave the rows of no sequence as they are.
struct Sequences {
  const int32_t* cu_seqlens = nullptr;  // (batch + 1): first row of each sequence, and their end
  const int32_t* seqused = nullptr;     // (batch): how many rows of each sequence count
  int packed_rows = 0;                  // of the packed tensor

  FA_HOST_DEVICE constexpr Sequence at(int batch, int seqlen) const {
    Sequence sequence = {0, seqlen};
    if (cu_seqlens != nullptr) {
      sequence = {cu_seqlens[batch], cu_seqlens[batch + 1] - cu_seqlens[batch]};
    }
    if (seqused != nullptr) {
      sequence.length = seqused[batch];
    }
    return sequence;
  }

  // Tiles of tile_rows rows, numbered through the batch such that no two sequences share one.
  FA_HOST_DEVICE constexpr int64_t first_tile(int batch, int seqlen, int tile_rows) const {
    return cu_seqlens != nullptr
               ? cu_seqlens[batch] / tile_rows + batch
               : static_cast<int64_t>(batch) * ((seqlen + tile_rows - 1) / tile_rows);
  }

  // The tile of a sequence that has a number; one past its end where the number is before its
  // first, as those of the packed rows before the first sequence are.
  FA_HOST_DEVICE constexpr int tile_of_sequence(int64_t number, int batch, int seqlen,
                                                int tile_rows) const {
    const int64_t tile = number - first_tile(batch, seqlen, tile_rows);
    const int past_end = (at(batch, seqlen).length + tile_rows - 1) / tile_rows;
    return tile < 0 ? past_end : static_cast<int>(tile);
  }

  // The sequence and its tile that have a number; the tile may lie past the sequence's end, where
  // no sequence has that number. By bisection: first_tile() rises from each sequence to the next.
  struct NumberedTile {
    int batch;
    int tile;
  };
  FA_HOST_DEVICE constexpr NumberedTile tile_of_number(int64_t number, int batch, int seqlen,
                                                       int tile_rows) const {
    int found = 0;
    for (int end = batch; end - found > 1;) {
      const int middle = found + (end - found) / 2;
      (first_tile(middle, seqlen, tile_rows) <= number ? found : end) = middle;
    }
    return {found, tile_of_sequence(number, found, seqlen, tile_rows)};
  }

  // How many tiles first_tile() may number. total_rows: of the packed tensor.
  FA_HOST_DEVICE constexpr int64_t count_tiles(int batch, int64_t total_rows, int seqlen,
                                               int tile_rows) const {
    return cu_seqlens != nullptr ? total_rows / tile_rows + batch
                                 : first_tile(batch, seqlen, tile_rows);
  }
};

}  // namespace fa
