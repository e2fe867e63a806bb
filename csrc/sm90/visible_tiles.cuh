// SPDX-License-Identifier: BSD-3-Clause
// The tiles of keys that a tile of queries meets where rules say which.
#pragma once

#include "common/tile_map.h"
#include "ptx/common.cuh"

namespace fa::sm90 {

// By one warp: from the first tile to the last, without those in which no query sees a key. Looks
// at as many at a time as the warp has lanes.
class VisibleTiles {
 public:
  // among: that may be visible. g_classes: of these queries, or null.
  FA_DEVICE VisibleTiles(const PrefixWindow& window, Range queries, Range among, int tile_n,
                         const TileClass* g_classes)
      : window_(window),
        queries_(queries),
        tile_n_(tile_n),
        g_classes_(g_classes),
        next_(among.begin),
        end_(among.end) {
    look();
  }

  FA_DEVICE bool done() const { return visible_ == 0; }
  FA_DEVICE int tile() const { return first_ + bit(); }
  // Whether some of the pairs may be hidden.
  FA_DEVICE bool is_mixed() const { return mixed_ >> bit() & 1; }
  // Whether at most so many are left, the current one included. It may say no where there are, but
  // not when done.
  FA_DEVICE bool has_at_most(int tiles) const { return next_ >= end_ && __popc(visible_) <= tiles; }
  FA_DEVICE void advance() {
    visible_ &= visible_ - 1;
    look();
  }

 private:
  FA_DEVICE int bit() const { return __ffs(static_cast<int>(visible_)) - 1; }

  FA_DEVICE void look() {
    while (visible_ == 0 && next_ < end_) {
      first_ = next_;
      next_ += ptx::kWarpSize;
      const int tile = first_ + ptx::lane_index();
      const TileClass tile_class = tile < end_ ? class_at(tile) : TileClass::kHidden;
      visible_ = __ballot_sync(~0u, tile_class != TileClass::kHidden);
      mixed_ = __ballot_sync(~0u, tile_class == TileClass::kMixed);
    }
  }

  FA_DEVICE TileClass class_at(int tile) const {
    return g_classes_ != nullptr
               ? g_classes_[tile]
               : class_of(window_, queries_, {tile * tile_n_, (tile + 1) * tile_n_});
  }

  PrefixWindow window_;
  Range queries_;
  int tile_n_;
  const TileClass* g_classes_;
  int next_;  // the first tile not looked at
  int end_;
  int first_ = 0;  // of those looked at, as bits:
  uint32_t visible_ = 0;
  uint32_t mixed_ = 0;
};

}  // namespace fa::sm90
