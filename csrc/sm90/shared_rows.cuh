// SPDX-License-Identifier: BSD-3-Clause
// Rows of a shared tile that math warps change after TMA has brought them, for wgmma to read.
#pragma once

#include "device/warpgroup_mma.cuh"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"

namespace fa::sm90 {

// After this wgmma sees what the kThreads that meet here have written.
template <int kThreads = device::kWarpgroupThreads>
FA_DEVICE void show_rows(int barrier) {
  ptx::fence_async_proxy();
  ptx::barrier_sync<kThreads>(barrier);
}

// The rows of a tile from `first` on become zero, by kThreads. It is rare: unrolled, it would cost
// registers of the loops around it.
template <int kThreads = device::kWarpgroupThreads, typename Tile>
FA_DEVICE void clear_rows(Tile& s_tile, int first, int thread) {
  const int units = (Tile::kRows - first) * Tile::kUnitsPerLine;
#pragma unroll 1
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    uint4* s_panel = reinterpret_cast<uint4*>(s_tile.elements +
                                              (panel * Tile::kRows + first) * Tile::kPanelCols);
#pragma unroll 1
    for (int unit = thread; unit < units; unit += kThreads) {
      s_panel[unit] = {0, 0, 0, 0};
    }
  }
}

// Flips the signs of 64 rows of a tile, by one warpgroup.
template <typename Tile>
FA_DEVICE void negate_rows(Tile& s_tile, int first, int thread) {
  constexpr uint32_t kSigns = 0x80008000u;
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    uint4* s_panel = reinterpret_cast<uint4*>(s_tile.elements +
                                              (panel * Tile::kRows + first) * Tile::kPanelCols);
    for (int unit = thread; unit < device::kWarpgroupRows * Tile::kUnitsPerLine;
         unit += device::kWarpgroupThreads) {
      const uint4 bits = s_panel[unit];
      s_panel[unit] = {bits.x ^ kSigns, bits.y ^ kSigns, bits.z ^ kSigns, bits.w ^ kSigns};
    }
  }
}

}  // namespace fa::sm90
