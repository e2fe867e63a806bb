// SPDX-License-Identifier: BSD-3-Clause
// Row statistics from registers to global memory. Tiles leave through shared memory: store_elements
// (convert.cuh), a barrier, then SmemTile::store; on Hopper as sm90/store.cuh tells.
#pragma once

#include "device/fragment.cuh"

namespace fa::device {

// Writes one value per row of a warp's Tile, of which the first is row `row`; rows end at `rows`.
template <typename Tile>
FA_DEVICE void store_row_values(const typename Tile::RowValues& values, float* g_values, int row,
                                int rows) {
  if (leads_row()) {
#pragma unroll
    for (int i = 0; i < Tile::kRowsPerThread; ++i) {
      const int index = row + Tile::row(i);
      if (index < rows) {
        g_values[index] = values[i];
      }
    }
  }
}

}  // namespace fa::device
