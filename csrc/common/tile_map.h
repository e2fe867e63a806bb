// SPDX-License-Identifier: BSD-3-Clause
// What masks and documents mean for whole tiles, so that kernels skip those in which no pair is
// seen, and look at pairs only where some are hidden.
#pragma once

#include <cstdint>

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

// What the window and the prefix alone say.
FA_HOST_DEVICE constexpr TileClass class_of(const PrefixWindow& window, Range queries, Range keys) {
  return window.all(queries, keys)   ? TileClass::kSeen
         : window.any(queries, keys) ? TileClass::kMixed
                                     : TileClass::kHidden;
}

}  // namespace fa
