// SPDX-License-Identifier: BSD-3-Clause
// What masks and documents mean for whole tiles, so that kernels skip those in which no pair is
// seen, and look at pairs only where some are hidden; and the bits of those pairs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <utility>

#include "common/score_rules.h"
#include "common/types.h"

namespace fa {

enum class TileClass : uint8_t {
  kHidden,  // no query sees a key
  kMixed,   // some may, some may not
  kSeen,    // every query sees every key
};

// (heads or 1, tiles of queries of all sequences, tiles of keys of the longest). Null where no data
// decide: then the window and the prefix do.
struct TileMap {
  TileClass* classes = nullptr;
  int64_t head_stride = 0;  // 0: the same for all heads
  int key_tiles = 0;

  // query_tile: numbered through the batch, as by Sequences::first_tile().
  FA_HOST_DEVICE constexpr TileClass* row(int64_t head, int64_t query_tile) const {
    return classes + head * head_stride + query_tile * key_tiles;
  }
  FA_HOST_DEVICE constexpr TileClass at(int64_t head, int64_t query_tile, int key_tile) const {
    return row(head, query_tile)[key_tile];
  }
};

// A mask that has a byte for each pair, as bits: a tile of pairs after the other, each of (rows,
// cols / 32) words. Bit l of word w is column cols / 32 * l + w, and 0 past the ends of the
// tensors. Rows are queries and columns keys; or the other way round, for kernels whose scores are
// transposed. Null where there is no such mask, and where its bytes are read: by kernels that know
// no bits, and where these would take more memory than the mask does.
struct PairBits {
  static constexpr int kBitsOfWord = 32;
  static constexpr int64_t kFreeBytes = 1 << 20;  // that they may take in any case

  uint32_t* words = nullptr;
  int64_t batch_stride = 0;  // in words; 0 where one matrix stands for all
  int64_t head_stride = 0;
  int query_tiles = 0;
  int key_tiles = 0;
  int tile_words = 0;
  int64_t count = 0;  // of words: a bit for each pair of whole tiles

  constexpr int64_t bytes() const { return count * static_cast<int64_t>(sizeof(uint32_t)); }

  // Which mask it is: no other may have a byte for each pair.
  static FA_HOST_DEVICE constexpr bool is_of(const KeepMask& mask) {
    return mask.data != nullptr && mask.block_log2 == 0 && mask.query_stride != 0 &&
           mask.key_stride != 0;
  }

  // Of a mask's bytes in memory no fewer than there are, where one may stand for several pairs: for
  // all of a dimension, or where rows overlap.
  static constexpr int64_t bytes_of(const KeepMask& mask, int batch, int heads, int seqlen_q,
                                    int seqlen_k) {
    std::pair<int64_t, int> dimensions[] = {{mask.batch_stride, batch},
                                            {mask.head_stride, heads},
                                            {mask.query_stride, seqlen_q},
                                            {mask.key_stride, seqlen_k}};
    std::sort(std::begin(dimensions), std::end(dimensions));
    int64_t bytes = 1;
    int64_t extent = 1;  // from the first to behind the last
    for (const auto& [stride, size] : dimensions) {
      extent += stride * max(size - 1, 0);
      bytes = min(bytes * size, extent);
    }
    return bytes;
  }

  // For tiles of tile_m queries by tile_n keys; lengths are those of the longest sequences. The
  // memory is to be filled in.
  static constexpr PairBits of(const ScoreRules& rules, int batch, int heads, int seqlen_q,
                               int seqlen_k, int tile_m, int tile_n) {
    const KeepMask& mask = rules.masks[0];
    PairBits bits;
    if (is_of(mask)) {
      bits.query_tiles = ceil_div(seqlen_q, tile_m);
      bits.key_tiles = ceil_div(seqlen_k, tile_n);
      bits.tile_words = tile_m * tile_n / kBitsOfWord;
      const int64_t matrix = int64_t{bits.query_tiles} * bits.key_tiles * bits.tile_words;
      bits.head_stride = mask.head_stride == 0 ? 0 : matrix;
      bits.batch_stride = mask.batch_stride == 0 ? 0 : matrix * bits.heads(heads);
      bits.count = matrix * bits.heads(heads) * bits.batch(batch);
      // There may be fewer bytes than bits of whole tiles: of few queries or keys, or where rows
      // overlap.
      if (bits.bytes() > max(bytes_of(mask, batch, heads, seqlen_q, seqlen_k), kFreeBytes)) {
        return {};
      }
    }
    return bits;
  }

  // How many matrices there are, for so many heads and batch entries.
  FA_HOST_DEVICE constexpr int heads(int all) const { return head_stride == 0 ? 1 : all; }
  FA_HOST_DEVICE constexpr int batch(int all) const { return batch_stride == 0 ? 1 : all; }

  // query_tile: of its sequence.
  FA_HOST_DEVICE constexpr uint32_t* tile(int64_t batch, int64_t head, int64_t query_tile,
                                          int key_tile) const {
    return words + batch * batch_stride + head * head_stride +
           (query_tile * key_tiles + key_tile) * tile_words;
  }
};

// What the window and the prefix alone say.
FA_HOST_DEVICE constexpr TileClass class_of(const PrefixWindow& window, Range queries, Range keys) {
  return window.all(queries, keys)   ? TileClass::kSeen
         : window.any(queries, keys) ? TileClass::kMixed
                                     : TileClass::kHidden;
}

}  // namespace fa
