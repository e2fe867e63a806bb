// SPDX-License-Identifier: BSD-3-Clause
// Which block does what and in which order, where several add to the same sums.
#pragma once

#include "common/scheduler.h"
#include "common/workspace.h"
#include "ptx/reduce.cuh"

namespace fa::device {

FA_DEVICE WorkTile uniform(const WorkTile& tile) {
  return {ptx::uniform(tile.tile), ptx::uniform(tile.head), ptx::uniform(tile.batch)};
}

// The work item of this block. In a deterministic pass a block draws it when it begins, so that
// items begin in their order whatever order the hardware starts blocks in. s_ticket is shared
// memory that nobody writes before the block's next barrier.
FA_DEVICE WorkTile take_work(const TileScheduler& scheduler, const BwdWorkspace& workspace,
                             int64_t& s_ticket) {
  if (workspace.ticket() == nullptr) {
    return uniform(scheduler.at(scheduler.first + blockIdx.x));
  }
  if (threadIdx.x == 0) {
    s_ticket = static_cast<int64_t>(atomicAdd(workspace.ticket(), 1ULL));
  }
  __syncthreads();
  return uniform(scheduler.heads_first(s_ticket));
}

// The threads that add to a tile together: all of the block, or a part of kParts that each add on
// their own.
struct WholeBlock {
  static constexpr int kParts = 1;
  FA_DEVICE bool leads() const { return threadIdx.x == 0; }
  FA_DEVICE void sync() const { __syncthreads(); }
};

// Between begin_turn() and end_turn() it is these threads' turn to add to a tile: rank() blocks
// have added all of theirs before. Both do nothing where the pass is not deterministic and turn
// null.
template <typename Threads, typename Rank>
FA_DEVICE void begin_turn(const int* turn, const Threads& threads, Rank&& rank) {
  if (turn != nullptr) {
    if (threads.leads()) {
      const int before = Threads::kParts * rank();
      while (ptx::load_acquire(turn) < before) {
      }
    }
    threads.sync();
  }
}

template <typename Threads>
FA_DEVICE void end_turn(int* turn, const Threads& threads) {
  if (turn != nullptr) {
    threads.sync();  // what all have added goes with the leader's release
    if (threads.leads()) {
      ptx::add_release(turn, 1);
    }
  }
}

// The same between construction and end().
template <typename Threads>
class InTurn {
 public:
  template <typename Rank>
  FA_DEVICE InTurn(const BwdWorkspace& workspace, int64_t index, const Threads& threads,
                   Rank&& rank)
      : turn_(workspace.turn(index)), threads_(threads) {
    begin_turn(turn_, threads_, rank);
  }

  FA_DEVICE void end() { end_turn(turn_, threads_); }

 private:
  int* turn_;
  Threads threads_;
};

}  // namespace fa::device
