// SPDX-License-Identifier: BSD-3-Clause
// Where shared memory has no room for out, it replaces values that both math warpgroups have read.
// Of the block's last two tiles of them the first warpgroup takes the one before the last, and the
// second the last, so that neither waits for the end of the other's products. Each holds its tile:
// it releases it only when TMA has read out. At two named barriers of all math threads each tells
// the other that it has read what the other holds:
//   kFirstMay: the second arrives before its last product, and the first waits before it writes.
//   kSecondMay: the first arrives after a last product of the last tile, and the second waits
//   before it writes, unless the first does not see that tile.
// Of a single tile they take turns: the first writes after the second's product, and the second
// when out of the first has left.
// Neither barrier is arrived at for the next item before it has been waited at for this one: values
// of the next item that take the place of a held tile come after its release.
#pragma once

#include "common/key_tiles.h"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"

namespace fa::sm90 {

template <typename Traits>
class ValuesForOut {
 public:
  FA_DEVICE ValuesForOut(int warpgroup, const Range& block,
                         const KeyTiles (&s_of_warpgroup)[Traits::kMathWarpgroups])
      : is_first_(warpgroup == 0), is_single_(block.size() == 1) {
    const Range& own = s_of_warpgroup[warpgroup].seen;
    const Range& other = s_of_warpgroup[is_first_ ? 1 : 0].seen;
    is_alone_ = other.empty();
    both_end_ = own.end == other.end;
    held_ = block.end - (is_first_ && !is_single_ ? 2 : 1);
  }

  // The tile whose values this warpgroup must not release.
  FA_DEVICE int held() const { return held_; }

  FA_DEVICE void begin_last_product() const {
    if (!is_alone_ && !is_first_ && !is_single_) {
      ptx::barrier_arrive<Traits::kMathThreads>(kFirstMay);
    }
  }

  FA_DEVICE void end_last_product() const {
    if (!is_alone_ && is_first_ && !is_single_ && both_end_) {
      ptx::barrier_arrive<Traits::kMathThreads>(kSecondMay);
    } else if (!is_alone_ && !is_first_ && is_single_) {
      ptx::barrier_arrive<Traits::kMathThreads>(kFirstMay);
    }
  }

  // Until out may be written.
  FA_DEVICE void wait() const {
    if (!is_alone_ && is_first_) {
      ptx::barrier_sync<Traits::kMathThreads>(kFirstMay);
    } else if (!is_alone_ && both_end_) {
      ptx::barrier_sync<Traits::kMathThreads>(kSecondMay);
    }
  }

  // After thread 0 has had TMA store out.
  FA_DEVICE void end_write(int thread) const {
    if (!is_alone_ && is_first_ && is_single_) {
      if (thread == 0) {
        ptx::tma_wait_read();
      }
      __syncwarp();
      ptx::barrier_arrive<Traits::kMathThreads>(kSecondMay);
    }
  }

 private:
  static constexpr int kFirstMay = 1 + 2 * Traits::kMathWarpgroups;  // after those of the turns
  static constexpr int kSecondMay = kFirstMay + 1;

  bool is_first_;
  bool is_single_;  // tile of keys
  bool is_alone_;
  bool both_end_;  // with the same tile
  int held_;
};

}  // namespace fa::sm90
