// SPDX-License-Identifier: BSD-3-Clause
// Masks of a warp's tile. A row of a tile, whether a query against keys or a key against queries,
// sees one contiguous range of columns, so a mask is a range per row.
#pragma once

#include "common/window.h"
#include "device/fragment.cuh"

namespace fa::device {

FA_DEVICE constexpr bool covers(Range outer, Range inner) {
  return outer.begin <= inner.begin && inner.end <= outer.end;
}

// Sets the elements outside visible(row) to `masked`. The tile's first element is at
// (first_row, first_col).
template <typename Tile, typename Visible>
FA_DEVICE void keep_visible(Tile& r_tile, int first_row, int first_col,
                            float masked, Visible&& visible) {
  Range r_visible[Tile::kRowsPerThread];
#pragma unroll
  for (int row = 0; row < Tile::kRowsPerThread; ++row) {
    r_visible[row] = visible(first_row + accumulator_row(row));
  }
  r_tile.transform([&](float x, int row, int block, int i) {
    const int col = first_col + Tile::col(block, i);
    return r_visible[row].begin <= col && col < r_visible[row].end ? x : masked;
  });
}

}  // namespace fa::device
