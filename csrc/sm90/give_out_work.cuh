// SPDX-License-Identifier: BSD-3-Clause
// How a block's warp that takes work tells the others of it.
#pragma once

#include "device/pipeline.cuh"
#include "sm90/schedule.cuh"

namespace fa::sm90 {

// Of what tells of the work, one item comes while another is used.
inline constexpr int kWorkStages = 2;

// By one warp: takes items, tells of each through the work ring, and calls load(work) of what it
// has told. The next item is not taken before the warp that loads most allows it, for near the end
// of all work other blocks may be free sooner.
template <typename Work, typename Traits, typename Params, typename Load>
FA_DEVICE void give_out_work(const Params& params, const Schedule& schedule,
                             typename Traits::SharedMemory& s, Load&& load) {
  device::RingPosition<kWorkStages> work_at;
  device::RingPosition<1> may_take_at;
  const auto publish = [&](const Work& work) -> const Work& {
    work_at.wait_empty(s.work_ring);
    auto& s_work = s.work[work_at.stage()];
    s_work.write(params, work);
    if (ptx::lane_index() < Traits::kMathWarpgroups) {
      work_at.fill(s.work_ring);
    }
    __syncwarp();
    work_at.advance();
    return s_work;
  };
  const auto by_one_lane = [&](auto take) {
    const uint32_t item = ptx::lane_index() == 0 ? take(schedule) : 0;
    return __shfl_sync(~0u, item, 0);
  };
  for (uint32_t item = by_one_lane(take_first_item); item < schedule.items;
       item = by_one_lane(take_item)) {
    const Work work =
        Work::template of_item<Traits::kTileM, Traits::kTileN>(params, schedule, item);
    if (!work.exists()) {
      continue;
    }
    load(publish(work));
    may_take_at.wait(s.may_take);
    may_take_at.advance();
  }
  publish({.tile = {-1, 0, 0}, .window = params.window});
  if (ptx::lane_index() == 0) {
    finish_taking(schedule);
  }
}

}  // namespace fa::sm90
