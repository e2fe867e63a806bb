// SPDX-License-Identifier: BSD-3-Clause
// The rows of a result that belong to no sequence: kernels leave them as they are, so that someone
// has to fill them.
#pragma once

#include <cstdint>

#include "common/seqlen.h"
#include "common/types.h"
#include "common/window.h"

namespace fa {

// Gap `gap`, of batch + 1: what lies between two packed sequences, before the first or after the
// last one; or behind the sequence of a batch entry, in its own numbering, and nothing in the last
// gap. rows: of the packed tensor, or of each batch entry.
FA_HOST_DEVICE constexpr Range rows_left(const Sequences& sequences, int gap, int batch, int rows) {
  if (sequences.cu_seqlens == nullptr) {
    return {gap < batch ? sequences.at(gap, rows).length : rows, rows};
  }
  int begin = 0;
  if (gap > 0) {
    const Sequence before = sequences.at(gap - 1, rows);
    begin = before.begin + before.length;
  }
  return {begin, gap < batch ? sequences.cu_seqlens[gap] : rows};
}

// A contiguous result of (batch entries, planes, rows, words_of_row) of 32 bits each; packed
// sequences are all in one batch entry.
struct LeftRows {
  Sequences sequences;
  int batch;
  int rows;
  int planes;
  int64_t words_of_row;
  uint32_t* words;
  uint32_t value;  // for all of them

  FA_HOST_DEVICE constexpr int64_t first_word(int gap, int plane) const {
    const int64_t entry = sequences.cu_seqlens == nullptr ? gap : 0;
    return (entry * planes + plane) * rows * words_of_row;
  }
};

}  // namespace fa
