// SPDX-License-Identifier: BSD-3-Clause
// From the registers of a warpgroup to global memory.
#pragma once

#include "device/convert.cuh"
#include "device/warpgroup_mma.cuh"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"
#include "sm90/tensor_map.h"

namespace fa::sm90 {

// By one warp: 16 bytes after 16 bytes of at most 16 rows become units(row, col).
template <typename Element, typename Units>
FA_DEVICE void store_units(const device::GlobalTile<Element>& destination, Units&& units) {
  constexpr int kUnitElements = 16 / sizeof(Element);
  const int units_per_row = destination.cols / kUnitElements;
  const int rows = max(min(destination.rows, device::kBlockRows), 0);
  for (int unit = ptx::lane_index(); unit < rows * units_per_row; unit += ptx::kWarpSize) {
    const int row = unit / units_per_row;
    const int col = unit % units_per_row * kUnitElements;
    *reinterpret_cast<uint4*>(destination.at(row, col)) = units(row, col);
  }
}

// By one warpgroup: its 64 rows of elements leave through the tile's rows from `row` on: by TMA, or
// where the sequence ends among them by lanes. `destination`: of the warp's rows.
template <typename Elements, typename Tile, typename Element>
FA_DEVICE void store_through(const Elements& r_elements, Tile& s_tile, int row,
                             const CUtensorMap& map, const ptx::BoxOrigin& origin,
                             const device::GlobalTile<Element>& destination, int barrier) {
  const int thread = static_cast<int>(threadIdx.x) % device::kWarpgroupThreads;
  const int warp_row = thread / ptx::kWarpSize * device::kBlockRows;
  device::store_blocks(r_elements, s_tile, row + warp_row, 0);
  ptx::fence_async_proxy();
  if (destination.rows + warp_row < device::kWarpgroupRows) {
    __syncwarp();
    store_units<Element>(destination, [&](int unit_row, int col) {
      return *reinterpret_cast<const uint4*>(s_tile.elements +
                                             Tile::offset(row + warp_row + unit_row, col));
    });
    __syncwarp();
  }
  ptx::barrier_sync<device::kWarpgroupThreads>(barrier);
  if (thread == 0 && destination.rows >= device::kWarpgroupRows) {
#pragma unroll
    for (int col = 0; col < Elements::kCols; col += Tile::kPanelCols) {
      ptx::tma_store(
          &map, {col, origin.row, origin.head, origin.batch},
          s_tile.elements + (col / Tile::kPanelCols * Tile::kRows + row) * Tile::kPanelCols);
    }
    ptx::tma_commit();
  }
}

}  // namespace fa::sm90
