// SPDX-License-Identifier: BSD-3-Clause
// The gradient of a bias in tiles of queries and keys: which scores add to them, and in which order
// blocks take them.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "common/params.h"
#include "common/scheduler.h"
#include "common/window.h"

namespace fa {

// Of the entries of a dimension, those that share one of the bias; and how many the bias has.
FA_HOST_DEVICE constexpr Range shared_range(int entry, int count, int64_t stride) {
  return stride == 0 ? Range{0, count} : Range{min(entry, count), min(entry + 1, count)};
}
FA_HOST_DEVICE constexpr int entries_of(int count, int64_t stride) {
  return stride == 0 ? 1 : count;
}

// A block takes a strip, some tiles of queries by one tile of keys, of one (batch entry, head) of
// the bias. Of a dimension that is broadcast there is one tile for all.
struct DbiasTiles {
  int query_tiles;
  int key_tiles;
  int strip;  // tiles of queries

  // For blocks that run together. Where nothing shares a tile, those of a strip have all keys in
  // common; where much does, each tile is work enough.
  static constexpr DbiasTiles of(const Shape& shape, const ScoreTensor& dbias, int tile_m,
                                 int tile_n, int blocks) {
    constexpr int64_t kStripsOfBlock = 4;
    constexpr int kLongest = 8;
    DbiasTiles tiles = {entries_of(ceil_div(shape.seqlen_q, tile_m), dbias.query_stride),
                        entries_of(ceil_div(shape.seqlen_k, tile_n), dbias.key_stride), 1};
    const int heads = entries_of(shape.num_heads, dbias.head_stride);
    const int batch = entries_of(shape.batch, dbias.batch_stride);
    if (heads == shape.num_heads && batch == shape.batch) {
      const int64_t count = int64_t{tiles.query_tiles} * tiles.key_tiles * heads * batch;
      const int64_t each = count / (kStripsOfBlock * blocks);
      const int longest = min(kLongest, max(tiles.query_tiles, 1));
      tiles.strip = static_cast<int>(min(max(each, int64_t{1}), int64_t{longest}));
    }
    return tiles;
  }

  // Strips of each head of the bias.
  constexpr TileScheduler schedule(const Shape& shape, const ScoreTensor& dbias) const {
    const bool is_empty = shape.seqlen_q == 0 || shape.seqlen_k == 0 || shape.batch == 0;
    return {is_empty ? 0 : strips() * key_tiles, entries_of(shape.num_heads, dbias.head_stride),
            entries_of(shape.batch, dbias.batch_stride)};
  }

  FA_HOST_DEVICE constexpr int strips() const { return ceil_div(query_tiles, strip); }
  FA_HOST_DEVICE constexpr int key_tile(int item) const { return item / strips(); }
  FA_HOST_DEVICE constexpr Range queries(int item) const {
    const int first = item % strips() * strip;
    return {first, min(first + strip, query_tiles)};
  }
};

}  // namespace fa
