// SPDX-License-Identifier: BSD-3-Clause
// The tiles of keys that a tile of queries meets where rules say which.
#pragma once

#include "common/tile_map.h"
#include "ptx/common.cuh"

namespace fa::sm90 {

enum class Tiles { kVisible, kMixed };

// By one warp: from the last tile to the first, without those in which no query sees a key; or
// without those too in which every query sees every key. class_of(tile) is asked of as many at a
// time as the warp has lanes, before they are needed. The first advance() comes to the last tile.
//
// From the last one, so that under a causal mask with ALiBi scores mostly fall from tile to tile,
// and the base of the softmax (speculative_softmax.cuh) need not be raised.
template <typename ClassOf>
class VisibleTiles {
 public:
  // among: that may be visible.
  FA_DEVICE VisibleTiles(Tiles which, Range among, const ClassOf& class_of)
      : which_(which),
        class_of_(class_of),
        begin_(among.begin),
        next_(among.end - 1 + ptx::kWarpSize) {}

  FA_DEVICE void advance() {
    visible_ &= visible_ - 1;  // none, where there was none
#pragma unroll 1
    while (visible_ == 0 && next_ >= begin_) {
      const TileClass tile_class = ahead_;
      last_ = next_;
      next_ -= ptx::kWarpSize;
      const int tile = next_ - ptx::lane_index();
      ahead_ = tile >= begin_ ? class_of_(tile) : TileClass::kHidden;
      mixed_ = __ballot_sync(~0u, tile_class == TileClass::kMixed);
      visible_ =
          which_ == Tiles::kMixed ? mixed_ : __ballot_sync(~0u, tile_class != TileClass::kHidden);
    }
  }

  FA_DEVICE bool done() const { return visible_ == 0; }
  FA_DEVICE int tile() const { return last_ - bit(); }
  // Whether some of the pairs may be hidden.
  FA_DEVICE bool is_mixed() const { return mixed_ >> bit() & 1; }
  // Whether at most so many are left, the current one included. It may say no where there are, but
  // not when done.
  FA_DEVICE bool has_at_most(int tiles) const {
    return next_ < begin_ && __popc(visible_) <= tiles;
  }

 private:
  FA_DEVICE int bit() const { return __ffs(static_cast<int>(visible_)) - 1; }

  Tiles which_;
  ClassOf class_of_;
  int begin_;
  int next_;                              // the last tile not looked at
  TileClass ahead_ = TileClass::kHidden;  // of this lane's tile of those up to there
  int last_ = 0;                          // of those looked at, as bits:
  uint32_t visible_ = 0;
  uint32_t mixed_ = 0;
};

}  // namespace fa::sm90
