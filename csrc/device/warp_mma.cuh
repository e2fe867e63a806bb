// SPDX-License-Identifier: BSD-3-Clause
// Products of a warp, accumulated in float: the warp's rectangle of a block's result, with operands
// from tiles in shared memory or from registers. The operands of the next mma are loaded before the
// current one is issued.
#pragma once

#include "device/fragment.cuh"
#include "ptx/reduce.cuh"

namespace fa::device {

// How the warps of a block share a (kTileRows, kTileCols) result: one rectangle each, as near to a
// square as multiples of 16 allow, since a warp reads rows + cols of operands for rows * cols of
// result. Where the tile is too small for all warps, several compute the same rectangle, and one of
// them leads.
template <int kTileRows, int kTileCols, int kWarps>
struct WarpGrid {
  static constexpr int kLeast = 16;  // rows or columns of a rectangle

  static constexpr int choose_row_warps() {
    int best = 1;
    int64_t best_reads = -1;
    for (int row_warps = 1; row_warps <= kWarps; row_warps *= 2) {
      const int rows = kTileRows / row_warps;
      if (rows < kLeast || rows % kLeast != 0) {
        continue;
      }
      const int cols = cols_of(row_warps);
      const int64_t reads = int64_t{rows + cols} * 4096 / (rows * cols);
      if (best_reads < 0 || reads < best_reads) {
        best = row_warps;
        best_reads = reads;
      }
    }
    return best;
  }

  static constexpr int cols_of(int row_warps) {
    const int cols = kTileCols * row_warps / kWarps;
    return cols < kLeast ? kLeast : cols;
  }

  static constexpr int kRowWarps = choose_row_warps();
  static constexpr int kRows = kTileRows / kRowWarps;
  static constexpr int kCols = cols_of(kRowWarps);
  static constexpr int kColWarps = kTileCols / kCols;
  static_assert(kTileCols % kCols == 0 && kCols % kLeast == 0);

  using Sum = Accumulator<kRows, kCols>;

  static FA_DEVICE int row() { return ptx::warp_index() % kRowWarps * kRows; }
  static FA_DEVICE int col() { return ptx::warp_index() / kRowWarps % kColWarps * kCols; }
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

// sum += a b over kSteps depth steps. load_a(r_a, step, row_block) and load_b(r_b, step, pair) fill
// the registers of an operand; a pair is 16 columns of b.
template <typename Element, int kSteps, typename Sum, typename LoadA, typename LoadB>
FA_DEVICE void accumulate(Sum& r_sum, LoadA&& load_a, LoadB&& load_b) {
  constexpr int kPairs = Sum::kColBlocks / 2;
  uint32_t r_a[2][Sum::kRowBlocks][4];
  uint32_t r_b[2][4];
#pragma unroll
  for (int a = 0; a < Sum::kRowBlocks; ++a) {
    load_a(r_a[0][a], 0, a);
  }
  load_b(r_b[0], 0, 0);
#pragma unroll
  for (int i = 0; i < kSteps * kPairs; ++i) {
    const int step = i / kPairs;
    const int pair = i % kPairs;
    if (i + 1 < kSteps * kPairs) {
      load_b(r_b[(i + 1) % 2], (i + 1) / kPairs, (i + 1) % kPairs);
    }
    if (pair == 0 && step + 1 < kSteps) {
#pragma unroll
      for (int a = 0; a < Sum::kRowBlocks; ++a) {
        load_a(r_a[(step + 1) % 2][a], step + 1, a);
      }
    }
#pragma unroll
    for (int a = 0; a < Sum::kRowBlocks; ++a) {
      const uint32_t(&r_left)[4] = r_a[step % 2][a];
      const uint32_t(&r_right)[4] = r_b[i % 2];
      ptx::mma_m16n8k16<Element>(r_sum.r[a][2 * pair], r_left, r_right[0], r_right[1]);
      ptx::mma_m16n8k16<Element>(r_sum.r[a][2 * pair + 1], r_left, r_right[2], r_right[3]);
    }
  }
}

// sum += a b^T: rows a_row .. of s_a (., depth) with rows b_row .. of s_b (., depth).
template <typename Element, int kRowsA, int kRowsB, int kDepth, typename Sum>
FA_DEVICE void accumulate_abt(Sum& r_sum, const SmemTile<Element, kRowsA, kDepth>& s_a, int a_row,
                              const SmemTile<Element, kRowsB, kDepth>& s_b, int b_row) {
  accumulate<Element, kDepth / kMmaDepth>(
      r_sum,
      [&](uint32_t(&r_a)[4], int step, int block) {
        load_a(r_a, s_a, a_row + block * kBlockRows, step * kMmaDepth);
      },
      [&](uint32_t(&r_b)[4], int step, int pair) {
        load_b_of_transposed(r_b, s_b, b_row + pair * 2 * kBlockCols, step * kMmaDepth);
      });
}

// The same with a in registers, and all rows of s_b from b_row on.
template <typename Element, int kRows, int kRowsB, int kDepth, typename Sum>
FA_DEVICE void accumulate_abt(Sum& r_sum, const OperandA<Element, kRows, kDepth>& r_rows,
                              const SmemTile<Element, kRowsB, kDepth>& s_b, int b_row) {
  accumulate<Element, kDepth / kMmaDepth>(
      r_sum,
      [&](uint32_t(&r_a)[4], int step, int block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          r_a[i] = r_rows.r[block][step][i];
        }
      },
      [&](uint32_t(&r_b)[4], int step, int pair) {
        load_b_of_transposed(r_b, s_b, b_row + pair * 2 * kBlockCols, step * kMmaDepth);
      });
}

// sum += a b: a in registers (rows, depth), with columns b_col .. of s_b (depth, .).
template <typename Element, int kRows, int kCols, int kDepth, typename Sum>
FA_DEVICE void accumulate_ab(Sum& r_sum, const OperandA<Element, kRows, kDepth>& r_rows,
                             const SmemTile<Element, kDepth, kCols>& s_b, int b_col) {
  accumulate<Element, kDepth / kMmaDepth>(
      r_sum,
      [&](uint32_t(&r_a)[4], int step, int block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          r_a[i] = r_rows.r[block][step][i];
        }
      },
      [&](uint32_t(&r_b)[4], int step, int pair) {
        load_b(r_b, s_b, step * kMmaDepth, b_col + pair * 2 * kBlockCols);
      });
}

// sum += a b: rows a_row .. of s_a (., depth) with columns b_col .. of s_b (depth, .).
template <typename Element, int kRowsA, int kCols, int kDepth, typename Sum>
FA_DEVICE void accumulate_ab(Sum& r_sum, const SmemTile<Element, kRowsA, kDepth>& s_a, int a_row,
                             const SmemTile<Element, kDepth, kCols>& s_b, int b_col) {
  accumulate<Element, kDepth / kMmaDepth>(
      r_sum,
      [&](uint32_t(&r_a)[4], int step, int block) {
        load_a(r_a, s_a, a_row + block * kBlockRows, step * kMmaDepth);
      },
      [&](uint32_t(&r_b)[4], int step, int pair) {
        load_b(r_b, s_b, step * kMmaDepth, b_col + pair * 2 * kBlockCols);
      });
}

// sum += a^T b: columns a_col .. of s_a (depth, .) with columns b_col .. of s_b (depth, .).
template <typename Element, int kColsA, int kColsB, int kDepth, typename Sum>
FA_DEVICE void accumulate_atb(Sum& r_sum, const SmemTile<Element, kDepth, kColsA>& s_a, int a_col,
                              const SmemTile<Element, kDepth, kColsB>& s_b, int b_col) {
  accumulate<Element, kDepth / kMmaDepth>(
      r_sum,
      [&](uint32_t(&r_a)[4], int step, int block) {
        load_a_of_transposed(r_a, s_a, step * kMmaDepth, a_col + block * kBlockRows);
      },
      [&](uint32_t(&r_b)[4], int step, int pair) {
        load_b(r_b, s_b, step * kMmaDepth, b_col + pair * 2 * kBlockCols);
      });
}

}  // namespace fa::device
