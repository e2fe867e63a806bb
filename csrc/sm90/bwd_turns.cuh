// SPDX-License-Identifier: BSD-3-Clause
// The order in which blocks add to dq, where a pass is deterministic: they take their work in the
// order in which they begin, which is from the last tile of keys of a head to the first, and add to
// a tile of dq in that order. A block so waits only for blocks that began before it.
#pragma once

#include "common/key_tiles.h"
#include "common/params.h"
#include "device/pipeline.cuh"
#include "ptx/reduce.cuh"
#include "sm90/bwd_traits.h"

namespace fa::sm90 {

// By two warps, for the warps that add: one waits for the turns of the block's tiles of dq, which
// are counters in global memory, and one passes them on. A stage of s.turn_ring is full when it is
// this block's turn to add to a tile, and one of s.added_ring when all have added, until the turn
// has been passed on. So those who add wait neither for global memory to answer nor for their
// additions to arrive there. In a pass that is not deterministic it is always their turn: kernels
// whose products leave no room for a branch ask all the same.
template <typename Traits>
FA_DEVICE void keep_turns(const BwdParams& params, typename Traits::SharedMemory& s, bool begins) {
  device::RingPosition<kWorkStages> work_at;
  device::RingPosition<kBwdStages> at;
  for (;; work_at.advance()) {
    work_at.wait(s.work_ring);
    const BwdWork& s_work = s.work[work_at.stage()];
    if (s_work.is_end()) {
      break;
    }
    QueryTiles tiles = s_work.template query_tiles<Traits::kTileM>(params);
    for (; !tiles.done(); tiles.advance(), at.advance()) {
      const QueryTile tile = tiles.current();
      int* g_turn = params.workspace.turn(
          params.workspace.index(tile.head, s_work.first_query_tile + tile.tile));
      if (ptx::lane_index() != 0) {
        continue;
      }
      if (begins) {
        at.wait_empty(s.added_ring);
        if (g_turn != nullptr) {
          const int turn = turn_of_key_tile(s_work.window, tile.tile, Traits::kTileM,
                                            s_work.first_key / Traits::kTileN, Traits::kTileN);
          while (ptx::load_acquire(g_turn) < turn) {
          }
        }
        at.fill(s.turn_ring);
      } else {
        at.wait(s.added_ring);
        if (g_turn != nullptr) {
          ptx::add_release(g_turn, 1);
        }
        at.release(s.added_ring);
      }
    }
    __syncwarp();
    work_at.release(s.work_ring);
  }
}

}  // namespace fa::sm90
