// SPDX-License-Identifier: BSD-3-Clause
// Products of a warp, accumulated in float: the warp's rectangle of a block's result, with operands
// from tiles in shared memory or from registers.
#pragma once

#include "device/fragment.cuh"
#include "ptx/reduce.cuh"

namespace fa::device {

// How the warps of a block share a (kTileRows, kTileCols) result: each has kRows consecutive rows
// and kCols columns, as near to a square as possible, since a warp reads rows + cols of operands for
// rows * cols of result. Warps side by side take turns in slices of 16 columns: addresses then are
// one register plus constants whatever kTileCols is. Where the tile is too small for all warps,
// several compute the same, and one of them leads.
template <int kTileRows, int kTileCols, int kWarps>
struct WarpGrid {
  static constexpr int kSlice = 2 * kBlockCols;

  static constexpr int cols_of(int row_warps) {
    const int cols = kTileCols * row_warps / kWarps;
    return cols < kSlice ? kSlice : cols;
  }

  static constexpr int choose_row_warps() {
    int best = 1;
    int64_t least_reads = -1;
    for (int row_warps = 1; row_warps <= kWarps; row_warps *= 2) {
      const int rows = kTileRows / row_warps;
      const int cols = cols_of(row_warps);
      if (rows % kBlockRows != 0 || rows == 0 || cols % kSlice != 0) {
        continue;
      }
      const int64_t reads = int64_t{rows + cols} * kTileRows * kTileCols / (rows * cols);
      if (least_reads < 0 || reads < least_reads) {
        best = row_warps;
        least_reads = reads;
      }
    }
    return best;
  }

  static constexpr int kRowWarps = choose_row_warps();
  static constexpr int kRows = kTileRows / kRowWarps;
  static constexpr int kCols = cols_of(kRowWarps);
  static constexpr int kColWarps = kTileCols / kCols;
  static_assert(kRowWarps * kColWarps <= kWarps && kColWarps * kCols == kTileCols);

  using Sum = Accumulator<kRows, kCols, kSlice * kColWarps>;

  static FA_DEVICE int row() { return ptx::warp_index() % kRowWarps * kRows; }
  static FA_DEVICE int col() { return ptx::warp_index() / kRowWarps % kColWarps * kSlice; }
  static FA_DEVICE bool leads() { return ptx::warp_index() < kRowWarps * kColWarps; }

  // A tile of float sums in global memory that no one reads by row and column: each 16x8 block of a
  // warp's result is 128 consecutive floats, so that whole lines are added and read.
  static FA_DEVICE void add(float* g_sums, const Sum& r_sum) {
    if (leads()) {
      each_block([&](int a, int b, int offset) {
        ptx::reduce_add_block(g_sums + offset, r_sum.r[a][b]);
      });
    }
  }

  static FA_DEVICE void load(const float* g_sums, Sum& r_sum) {
    each_block(
        [&](int a, int b, int offset) { ptx::load_block(g_sums + offset, r_sum.r[a][b]); });
  }

 private:
  template <typename Visit>
  static FA_DEVICE void each_block(Visit&& visit) {
    const int first = ptx::warp_index() % (kRowWarps * kColWarps) * kRows * kCols;
#pragma unroll
    for (int a = 0; a < Sum::kRowBlocks; ++a) {
#pragma unroll
      for (int b = 0; b < Sum::kColBlocks; ++b) {
        visit(a, b, first + (a * Sum::kColBlocks + b) * kBlockRows * kBlockCols);
      }
    }
  }
};

// sum += a b over kSteps depth steps. load_a(r_a, step, row_block) and load_b(r_b, step, col) fill
// the registers of an operand, for the 16 columns of b from `col` on.
template <typename Element, int kSteps, typename Sum, typename LoadA, typename LoadB>
FA_DEVICE void accumulate(Sum& r_sum, LoadA&& load_a, LoadB&& load_b) {
  constexpr int kSlices = Sum::kColBlocks / 2;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t r_a[Sum::kRowBlocks][4];
#pragma unroll
    for (int a = 0; a < Sum::kRowBlocks; ++a) {
      load_a(r_a[a], step, a);
    }
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      uint32_t r_b[4];
      load_b(r_b, step, slice * Sum::kSliceStride);
#pragma unroll
      for (int a = 0; a < Sum::kRowBlocks; ++a) {
        ptx::mma_m16n8k16<Element>(r_sum.r[a][2 * slice], r_a[a], r_b[0], r_b[1]);
        ptx::mma_m16n8k16<Element>(r_sum.r[a][2 * slice + 1], r_a[a], r_b[2], r_b[3]);
      }
    }
  }
}

// sum += a b^T: rows a_row .. of s_a (., depth) with rows b_row .. of s_b (., depth).
template <typename Element, int kRowsA, int kRowsB, int kDepth, typename Sum>
FA_DEVICE void accumulate_abt(Sum& r_sum, const SmemTile<Element, kRowsA, kDepth>& s_a, int a_row,
                              const SmemTile<Element, kRowsB, kDepth>& s_b, int b_row) {
  const auto a = LanePointer<SmemTile<Element, kRowsA, kDepth>>::down_first(s_a, a_row, 0);
  const auto b = LanePointer<SmemTile<Element, kRowsB, kDepth>>::right_first(s_b, b_row, 0);
  accumulate<Element, kDepth / kMmaDepth>(
      r_sum,
      [&](uint32_t(&r_a)[4], int step, int block) {
        a.load(r_a, block * kBlockRows, step * kMmaDepth);
      },
      [&](uint32_t(&r_b)[4], int step, int col) { b.load(r_b, col, step * kMmaDepth); });
}

// sum += a b: a in registers (rows, depth), with columns b_col .. of s_b (depth, .).
template <typename Element, int kRows, int kCols, int kDepth, typename Sum>
FA_DEVICE void accumulate_ab(Sum& r_sum, const OperandA<Element, kRows, kDepth>& r_rows,
                             const SmemTile<Element, kDepth, kCols>& s_b, int b_col) {
  const auto b = LanePointer<SmemTile<Element, kDepth, kCols>>::down_first(s_b, 0, b_col);
  accumulate<Element, kDepth / kMmaDepth>(
      r_sum,
      [&](uint32_t(&r_a)[4], int step, int block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          r_a[i] = r_rows.r[block][step][i];
        }
      },
      [&](uint32_t(&r_b)[4], int step, int col) { b.load_transposed(r_b, step * kMmaDepth, col); });
}

// sum += a b: rows a_row .. of s_a (., depth) with columns b_col .. of s_b (depth, .).
template <typename Element, int kRowsA, int kCols, int kDepth, typename Sum>
FA_DEVICE void accumulate_ab(Sum& r_sum, const SmemTile<Element, kRowsA, kDepth>& s_a, int a_row,
                             const SmemTile<Element, kDepth, kCols>& s_b, int b_col) {
  const auto a = LanePointer<SmemTile<Element, kRowsA, kDepth>>::down_first(s_a, a_row, 0);
  const auto b = LanePointer<SmemTile<Element, kDepth, kCols>>::down_first(s_b, 0, b_col);
  accumulate<Element, kDepth / kMmaDepth>(
      r_sum,
      [&](uint32_t(&r_a)[4], int step, int block) {
        a.load(r_a, block * kBlockRows, step * kMmaDepth);
      },
      [&](uint32_t(&r_b)[4], int step, int col) { b.load_transposed(r_b, step * kMmaDepth, col); });
}

// sum += a^T b: columns a_col .. of s_a (depth, .) with columns b_col .. of s_b (depth, .).
template <typename Element, int kColsA, int kColsB, int kDepth, typename Sum>
FA_DEVICE void accumulate_atb(Sum& r_sum, const SmemTile<Element, kDepth, kColsA>& s_a, int a_col,
                              const SmemTile<Element, kDepth, kColsB>& s_b, int b_col) {
  const auto a = LanePointer<SmemTile<Element, kDepth, kColsA>>::right_first(s_a, 0, a_col);
  const auto b = LanePointer<SmemTile<Element, kDepth, kColsB>>::down_first(s_b, 0, b_col);
  accumulate<Element, kDepth / kMmaDepth>(
      r_sum,
      [&](uint32_t(&r_a)[4], int step, int block) {
        a.load_transposed(r_a, step * kMmaDepth, block * kBlockRows);
      },
      [&](uint32_t(&r_b)[4], int step, int col) { b.load_transposed(r_b, step * kMmaDepth, col); });
}

}  // namespace fa::device
