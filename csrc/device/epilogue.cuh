// SPDX-License-Identifier: BSD-3-Clause
// Rows between registers and global memory.
#pragma once

#include "device/convert.cuh"

namespace fa::device {

// Writes a warp's 16 rows in 16-byte pieces, through rows s_row .. s_row + 15 of a shared tile that
// only this warp still uses. The destination's first row is the first row of the shared tile.
template <typename Element, int kRows, int kCols>
FA_DEVICE void store_rows(const Accumulator<kCols>& r_tile,
                          SmemTile<Element, kRows, kCols>& s_staging, int s_row,
                          const GlobalTile<Element>& destination) {
  using Tile = SmemTile<Element, kRows, kCols>;
  const int first = Tile::offset(s_row + accumulator_row(0), accumulator_col(0, 0));
  __syncwarp();
#pragma unroll
  for (int block = 0; block < r_tile.kBlocks; ++block) {
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      Element* s_pair = s_staging.elements + Tile::step(first, 8 * row, kBlockCols * block);
      *reinterpret_cast<uint32_t*>(s_pair) =
          ptx::convert_pair<Element>(r_tile.r[block][2 * row], r_tile.r[block][2 * row + 1]);
    }
  }
  __syncwarp();
#pragma unroll 1  // unrolled, its addresses would occupy registers through the whole kernel
  for (int unit = ptx::lane_index(); unit < kWarpRows * Tile::kUnitsPerRow;
       unit += ptx::kWarpSize) {
    const int row = s_row + unit / Tile::kUnitsPerRow;
    const int col = unit % Tile::kUnitsPerRow * Tile::kUnitElements;
    if (row < destination.rows && col < destination.cols) {
      *reinterpret_cast<uint4*>(destination.at(row, col)) =
          *reinterpret_cast<const uint4*>(s_staging.at(row, col));
    }
  }
}

// Reads one value per row of the warp's 16, of which the first is row `row`; rows from `rows` on
// have the value `missing`.
FA_DEVICE void load_row_values(float (&values)[kRowsPerThread], const float* g_values, int row,
                               int rows, float missing) {
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int index = row + accumulator_row(i);
    values[i] = index < rows ? g_values[index] : missing;
  }
}

// Writes one value per row of the warp's 16, of which the first is row `row`; rows end at `rows`.
FA_DEVICE void store_row_values(const float (&values)[kRowsPerThread], float* g_values, int row,
                                int rows) {
  if (leads_row()) {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int index = row + accumulator_row(i);
      if (index < rows) {
        g_values[index] = values[i];
      }
    }
  }
}

}  // namespace fa::device
