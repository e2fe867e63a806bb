// SPDX-License-Identifier: BSD-3-Clause
// Which block does what and in which order, where several add to the same sums.
#pragma once

#include "common/scheduler.h"
#include "common/seqlen.h"
#include "common/workspace.h"
#include "ptx/reduce.cuh"

namespace fa::device {

FA_DEVICE WorkTile uniform(const WorkTile& tile) {
  return {ptx::uniform(tile.tile), ptx::uniform(tile.head), ptx::uniform(tile.batch)};
}

// The sequence and its tile that have a number, as Sequences::tile_of_number() finds them, by all
// lanes of a warp: each looks at one sequence of a 32nd of those left over.
FA_DEVICE Sequences::NumberedTile find_tile(const Sequences& sequences, int64_t number, int batch,
                                            int seqlen, int tile_rows) {
  int found = 0;
  for (int end = batch; end - found > 1;) {
    const int step = ceil_div(end - found, ptx::kWarpSize);
    const int candidate = found + ptx::lane_index() * step;
    const bool begins_before =
        candidate < end && sequences.first_tile(candidate, seqlen, tile_rows) <= number;
    found += (max(__popc(__ballot_sync(~0u, begins_before)), 1) - 1) * step;
    end = min(found + step, end);
  }
  return {found, sequences.tile_of_sequence(number, found, seqlen, tile_rows)};
}

// A work item as a tile of a sequence. Tiles of packed sequences are numbered through the batch,
// and some lie past the end of their sequence.
FA_DEVICE WorkTile in_sequence(const WorkTile& item, const Sequences& sequences, int batch,
                               int seqlen, int tile_rows) {
  if (sequences.cu_seqlens == nullptr) {
    return uniform(item);
  }
  const auto found = find_tile(sequences, item.tile, batch, seqlen, tile_rows);
  return uniform({found.tile, item.head, found.batch});
}

// The work item of this block. In a deterministic pass a block draws it when it begins, so that
// items begin in their order whatever order the hardware starts blocks in. s_ticket is shared
// memory that nobody writes before the block's next barrier.
FA_DEVICE WorkTile take_work(const TileScheduler& scheduler, const BwdWorkspace& workspace,
                             int64_t& s_ticket) {
  if (workspace.ticket() == nullptr) {
    return scheduler.at(scheduler.first + blockIdx.x);
  }
  if (threadIdx.x == 0) {
    s_ticket = static_cast<int64_t>(atomicAdd(workspace.ticket(), 1ULL));
  }
  __syncthreads();
  return scheduler.heads_first(s_ticket);
}

// Between construction and end() it is this block's turn to add to a tile: rank() blocks have added
// all of theirs before. Does nothing where the pass is not deterministic.
class InTurn {
 public:
  template <typename Rank>
  FA_DEVICE InTurn(const BwdWorkspace& workspace, int64_t index, Rank&& rank)
      : turn_(workspace.turn(index)) {
    if (turn_ != nullptr) {
      if (threadIdx.x == 0) {
        const int before = rank();
        while (ptx::load_acquire(turn_) < before) {
        }
      }
      __syncthreads();
    }
  }

  FA_DEVICE void end() {
    if (turn_ != nullptr) {
      __syncthreads();  // what all have added goes with this thread's release
      if (threadIdx.x == 0) {
        ptx::add_release(turn_, 1);
      }
    }
  }

 private:
  int* turn_;
};

}  // namespace fa::device
