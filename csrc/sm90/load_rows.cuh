// SPDX-License-Identifier: BSD-3-Clause
// From global memory to shared tiles by TMA.
#pragma once

#include "device/pipeline.cuh"
#include "ptx/tma.cuh"
#include "sm90/tensor_map.h"

namespace fa::sm90 {

// By one thread: copies rows of a tensor to rows [first, first + kRows) of a tile, for a barrier
// that expects them.
template <typename Tile>
FA_DEVICE void copy_rows(Tile& s_tile, int first, uint64_t& s_full, const CUtensorMap& map, int row,
                         int head, int batch) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    ptx::tma_load(s_tile.elements + (panel * Tile::kRows + first) * Tile::kPanelCols, &map,
                  {panel * Tile::kPanelCols, row, head, batch}, s_full);
  }
}

// By one warp: the same to a stage of a ring, when that is free.
template <int kRows, typename Tile, int kRingStages>
FA_DEVICE void load_rows(Tile (&s_tiles)[kRingStages], int first, device::Ring<kRingStages>& s_ring,
                         const device::RingPosition<kRingStages>& at, const CUtensorMap& map,
                         int row, int head, int batch) {
  at.wait_empty(s_ring);
  if (ptx::lane_index() == 0) {
    uint64_t& s_full = at.expect(s_ring, sizeof(Tile) / Tile::kRows * kRows);
    copy_rows(s_tiles[at.stage()], first, s_full, map, row, head, batch);
  }
  __syncwarp();
}

// Where a warp waits for what it has copied itself.
struct Landing {
  device::Ring<1>& s_ring;
  device::RingPosition<1> at = {};
};

// By one warp: brings so many bytes to a stage of a ring, when that is free. copy(s_barrier), by
// one lane, starts copies. Where `is_cut`, the stage is full only when clear(lane) has changed what
// came.
template <typename Ring, typename Position, typename Copy, typename Clear>
FA_DEVICE void fill_stage(Ring& s_ring, const Position& at, int bytes, bool is_cut,
                          Landing& landing, Copy&& copy, Clear&& clear) {
  at.wait_empty(s_ring);
  if (ptx::lane_index() == 0) {
    copy(is_cut ? landing.at.expect(landing.s_ring, bytes) : at.expect(s_ring, bytes));
  }
  __syncwarp();
  if (is_cut) {
    landing.at.wait(landing.s_ring);
    landing.at.advance();
    clear(ptx::lane_index());
    ptx::fence_async_proxy();
    __syncwarp();
    if (ptx::lane_index() == 0) {
      at.fill(s_ring);
    }
  }
}

}  // namespace fa::sm90
