// SPDX-License-Identifier: BSD-3-Clause
// Where shared memory has no room for out, it replaces values that both math warpgroups have read.
// Of the block's last two tiles of them the first warpgroup takes the one before the last, and the
// second the last, so that neither waits for the end of the other's products: a first warpgroup
// that sees any key sees the tile before the last, or the only one, and a second one ends with the
// last. Each holds its tile: it releases it only when TMA has read out. Where both see keys, each
// tells the other at a named barrier of all math threads that it has read what the other holds:
//   kFirstMay: the second arrives before its last product, and the first waits before it writes.
//   kSecondMay: the first arrives after its product of the last tile, and the second waits before
//   it writes, unless the first does not see that tile.
// Of a single tile they take turns: the first writes after the second's product, and the second
// when out of the first has left.
// Neither barrier is arrived at for the next item before it has been waited at for this one: values
// of the next item that take the place of a held tile come after its release, and after a single
// tile the turns keep the order.
#pragma once

#include "common/key_tiles.h"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"

namespace fa::sm90 {

template <typename Traits>
class ValuesForOut {
 public:
  // own_barrier: of this warpgroup.
  FA_DEVICE ValuesForOut(int warpgroup, int own_barrier, const Range& block,
                         const KeyTiles (&s_of_warpgroup)[Traits::kMathWarpgroups])
      : own_barrier_(own_barrier) {
    const bool is_first = warpgroup == 0;
    const bool is_single = block.size() == 1;
    const Range& own = s_of_warpgroup[warpgroup].seen;
    const Range& other = s_of_warpgroup[is_first ? 1 : 0].seen;
    const bool is_alone = other.empty();
    const bool both_end = own.end == other.end;
    tells_before_product_ = !is_alone && !is_first && !is_single;
    tells_after_product_ = !is_alone && (is_first ? !is_single && both_end : is_single);
    tells_when_written_ = !is_alone && is_first && is_single;
    waits_ = !is_alone && (is_first || both_end);
    may_write_ = is_first ? kFirstMay : kSecondMay;
    held_ = block.end - (is_first && !is_single ? 2 : 1);
  }

  // The tile whose values this warpgroup must not release.
  FA_DEVICE int held() const { return held_; }

  FA_DEVICE void begin_last_product() const { tell(tells_before_product_); }
  FA_DEVICE void end_last_product() const { tell(tells_after_product_); }

  // Until out may be written: the warps of this warpgroup too have read its values.
  FA_DEVICE void wait() const {
    if (waits_) {
      ptx::barrier_sync<Traits::kMathThreads>(may_write_);
    } else {
      ptx::barrier_sync<device::kWarpgroupThreads>(own_barrier_);
    }
  }

  // After thread 0 has had TMA store out.
  FA_DEVICE void end_write(int thread) const {
    if (tells_when_written_) {
      if (thread == 0) {
        ptx::tma_wait_read();
      }
      __syncwarp();
      tell(true);
    }
  }

 private:
  static constexpr int kFirstMay = 1 + 2 * Traits::kMathWarpgroups;  // after those of the turns
  static constexpr int kSecondMay = kFirstMay + 1;

  FA_DEVICE void tell(bool tells) const {
    if (tells) {
      ptx::barrier_arrive<Traits::kMathThreads>(kFirstMay + kSecondMay - may_write_);
    }
  }

  int own_barrier_;
  bool tells_before_product_;  // the other one, that it may write
  bool tells_after_product_;
  bool tells_when_written_;
  bool waits_;
  int may_write_;  // the barrier to wait at
  int held_;
};

}  // namespace fa::sm90
