// SPDX-License-Identifier: BSD-3-Clause
// Which block does what and in which order, where several add to the same sums.
#pragma once

#include "common/scheduler.h"
#include "common/workspace.h"
#include "ptx/reduce.cuh"

namespace fa::device {

// The work of a block. In a deterministic pass a block draws its next item when it is ready for it,
// so that items begin in their order whatever order the hardware starts blocks in.
class WorkQueue {
 public:
  FA_DEVICE WorkQueue(const TileScheduler& scheduler, const BwdWorkspace& workspace)
      : scheduler_(scheduler), ticket_(workspace.ticket()), next_(blockIdx.x) {}

  FA_DEVICE bool next(WorkTile& tile) {
    if (ticket_ != nullptr) {
      __shared__ int64_t s_next;
      if (threadIdx.x == 0) {
        s_next = static_cast<int64_t>(atomicAdd(ticket_, 1ULL));
      }
      __syncthreads();
      next_ = s_next;
      __syncthreads();
    }
    if (next_ >= scheduler_.count()) {
      return false;
    }
    tile = ticket_ != nullptr ? scheduler_.heads_first(next_) : scheduler_.at(next_);
    next_ += gridDim.x;
    return true;
  }

 private:
  const TileScheduler& scheduler_;
  unsigned long long* ticket_;
  int64_t next_;
};

// Between construction and end(), the only block that adds to a tile, and the one whose turn it is:
// rank() blocks add before it. Does nothing where the pass is not deterministic.
class InTurn {
 public:
  template <typename Rank>
  FA_DEVICE InTurn(const BwdWorkspace& workspace, int64_t index, Rank&& rank)
      : turn_(workspace.turn(index)) {
    if (turn_ != nullptr) {
      if (threadIdx.x == 0) {
        const int own = rank();
        while (ptx::load_acquire(turn_) != own) {
        }
      }
      __syncthreads();
    }
  }

  FA_DEVICE void end() {
    if (turn_ != nullptr) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        ptx::add_release(turn_, 1);
      }
    }
  }

 private:
  int* turn_;
};

}  // namespace fa::device
