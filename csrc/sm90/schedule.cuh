// SPDX-License-Identifier: BSD-3-Clause
// How the blocks of a launch share its work.
#pragma once

#include "common/scheduler.h"
#include "ptx/common.cuh"

namespace fa::sm90 {

// Items are numbered in the order in which they should begin. The first item of a block has the
// block's own index, and further ones it takes from the counter, which is null where there are no
// more items than blocks. Or, in_order, it takes all of them: then an item begins after all items
// of lower number, in whatever order the hardware starts the blocks.
struct Schedule {
  TileScheduler tiles;
  uint32_t items;  // and as many more as there are blocks fit 32 bits
  int head_group;
  WorkCounter* counter;
  bool in_order = false;
};

// By one thread: the index of an item that no other block has, or one past the last.
FA_DEVICE uint32_t take_item(const Schedule& schedule) {
  const uint32_t own_items = schedule.in_order ? 0 : ptx::grid_size();
  return schedule.counter == nullptr ? ptx::opaque(schedule.items)
                                     : own_items + atomicAdd(&schedule.counter->taken, 1u);
}

// The same for a block's first item.
FA_DEVICE uint32_t take_first_item(const Schedule& schedule) {
  return schedule.in_order ? take_item(schedule) : blockIdx.x;
}

// By one thread of each block, when there are no more items: the last one leaves the counter as it
// was found.
FA_DEVICE void finish_taking(const Schedule& schedule) {
  if (schedule.counter == nullptr) {
    return;
  }
  __threadfence();
  if (atomicAdd(&schedule.counter->finished, 1u) + 1 == gridDim.x) {
    *schedule.counter = {};
  }
}

}  // namespace fa::sm90
