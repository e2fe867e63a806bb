// SPDX-License-Identifier: BSD-3-Clause
// Turns of the math warpgroups at what only one of them should do at a time.
#pragma once

#include "device/warpgroup_mma.cuh"
#include "ptx/barrier.cuh"

namespace fa::sm90 {

// Named barriers from kFirst on, one for each warpgroup, at which it waits for the one before it.
template <int kWarpgroups, int kFirst>
class Turns {
 public:
  FA_DEVICE explicit Turns(int warpgroup) : own_(kFirst + warpgroup) {
    next_ = warpgroup + 1 == kWarpgroups ? kFirst : own_ + 1;
    if (warpgroup + 1 == kWarpgroups) {
      end();
    }
  }
  FA_DEVICE void begin() const { ptx::barrier_sync<kThreads>(own_); }
  FA_DEVICE void end() const { ptx::barrier_arrive<kThreads>(next_); }
  FA_DEVICE void pass() const {
    begin();
    end();
  }

 private:
  static constexpr int kThreads = 2 * device::kWarpgroupThreads;
  int own_;
  int next_;
};

}  // namespace fa::sm90
