// SPDX-License-Identifier: BSD-3-Clause
// How the warps of a block share the result of a product.
#pragma once

#include "device/fragment.cuh"
#include "ptx/reduce.cuh"

namespace fa::device {

// Of a (kTileRows, kTileCols) result each warp has kRows rows and kCols columns, as near to a
// square as possible, since a warp reads rows + cols of operands for rows * cols of result. Warps
// take turns in slices of 16 rows and of 16 columns: addresses then are one register plus constants
// whatever the size of the tile. Where it is too small for all warps, several compute the same, and
// one leads.
template <int kTileRows, int kTileCols, int kWarps>
struct WarpGrid {
  static constexpr int kSlice = 2 * kBlockCols;

  static constexpr int cols_of(int row_warps) {
    const int cols = kTileCols * row_warps / kWarps;
    return cols < kSlice ? kSlice : cols;
  }

  static constexpr int choose_row_warps() {
    int best = 0;
    int least_work = 0;
    for (int row_warps = 1; row_warps <= kWarps; row_warps *= 2) {
      const int rows = kTileRows / row_warps;
      const int cols = cols_of(row_warps);
      if (rows % kBlockRows != 0 || rows == 0 || cols % kSlice != 0) {
        continue;
      }
      const int work = rows * cols * kTileRows + rows + cols;  // results first, then reads
      if (best == 0 || work < least_work) {
        best = row_warps;
        least_work = work;
      }
    }
    return best;
  }

  static constexpr int kRowWarps = choose_row_warps();
  static constexpr int kRows = kTileRows / kRowWarps;
  static constexpr int kCols = cols_of(kRowWarps);
  static constexpr int kColWarps = kTileCols / kCols;
  static_assert(kRowWarps * kColWarps <= kWarps && kColWarps * kCols == kTileCols);

  using Sum = Accumulator<kRows, kCols, kBlockRows * kRowWarps, kSlice * kColWarps>;

  static FA_DEVICE int row() { return ptx::warp_index() % kRowWarps * kBlockRows; }
  static FA_DEVICE int col() { return ptx::warp_index() / kRowWarps % kColWarps * kSlice; }
  static FA_DEVICE bool leads() {
    return kRowWarps * kColWarps == kWarps || ptx::warp_index() < kRowWarps * kColWarps;
  }

  // A tile of float sums in global memory that no one reads by row and column: each 16x8 block of a
  // warp's result is 128 consecutive floats, so that whole lines are added and read.
  static FA_DEVICE void add(float* g_sums, const Sum& r_sum) {
    if (leads()) {
      float* g_warp = warp_sums(g_sums);
      each_block(
          [&](int a, int b, int offset) { ptx::reduce_add_block(g_warp + offset, r_sum.r[a][b]); });
    }
  }

  static FA_DEVICE void load(const float* g_sums, Sum& r_sum) {
    const float* g_warp = warp_sums(g_sums);
    each_block([&](int a, int b, int offset) { ptx::load_block(g_warp + offset, r_sum.r[a][b]); });
  }

 private:
  template <typename Float>
  static FA_DEVICE Float* warp_sums(Float* g_sums) {
    return ptx::lane_of_block(g_sums +
                              ptx::warp_index() % (kRowWarps * kColWarps) * (kRows * kCols));
  }

  template <typename Visit>
  static FA_DEVICE void each_block(Visit&& visit) {
#pragma unroll
    for (int a = 0; a < Sum::kRowBlocks; ++a) {
#pragma unroll
      for (int b = 0; b < Sum::kColBlocks; ++b) {
        visit(a, b, (a * Sum::kColBlocks + b) * kBlockRows * kBlockCols);
      }
    }
  }
};

}  // namespace fa::device
