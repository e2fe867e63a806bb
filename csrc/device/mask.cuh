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

// A kFull kernel knows no band: only the end of the keys is masked.
template <MaskMode kMask>
FA_DEVICE Range keys_seen_by_any(const WindowMask& window, Range queries) {
  return kMask == MaskMode::kFull ? Range{0, window.seqlen_k()} : window.keys_seen_by_any(queries);
}

template <MaskMode kMask>
FA_DEVICE Range keys_seen_by_all(const WindowMask& window, Range queries) {
  return kMask == MaskMode::kFull ? Range{0, window.seqlen_k()} : window.keys_seen_by_all(queries);
}

template <MaskMode kMask>
FA_DEVICE Range queries_seeing_any(const WindowMask& window, Range keys) {
  return kMask == MaskMode::kFull ? Range{0, window.seqlen_q()} : window.queries_seeing_any(keys);
}

template <MaskMode kMask>
FA_DEVICE Range queries_seeing_all(const WindowMask& window, Range keys) {
  return kMask == MaskMode::kFull ? Range{0, window.seqlen_q()} : window.queries_seeing_all(keys);
}

// Sets the elements outside visible(row) to `masked`. The tile's first element is at
// (first_row, first_col).
template <int kCols, typename Visible>
FA_DEVICE void keep_visible(Accumulator<kCols>& r_tile, int first_row, int first_col, float masked,
                            Visible&& visible) {
  Range r_visible[kRowsPerThread];
#pragma unroll
  for (int row = 0; row < kRowsPerThread; ++row) {
    r_visible[row] = visible(first_row + accumulator_row(row));
  }
  r_tile.transform([&](float x, int row, int block, int i) {
    const int col = first_col + accumulator_col(block, i);
    return r_visible[row].begin <= col && col < r_visible[row].end ? x : masked;
  });
}

}  // namespace fa::device
