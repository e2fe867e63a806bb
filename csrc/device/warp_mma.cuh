// SPDX-License-Identifier: BSD-3-Clause
// Products of a warp, accumulated in float: the warp's rectangle of a block's result, with operands
// from tiles in shared memory or from registers.
#pragma once

#include "device/factors.cuh"
#include "device/word_pointer.cuh"

namespace fa::device {

// Of operands in shared memory: all steps, but for floats, of which the factors are registers more.
template <typename Element, int kSteps>
inline constexpr int kStepsAtOnce = sizeof(Element) == sizeof(float) ? 2 : kSteps;

// sum += a b over kSteps depth steps. load_a(r_a, step, row_block) and load_b(r_b, step, col) fill
// the registers of an operand, for the 16 columns of b from `col` on. kUnrolled: how many steps
// the compiler may interleave.
template <typename Element, int kSteps, int kUnrolled, typename Sum, typename LoadA, typename LoadB>
FA_DEVICE void accumulate(Sum& r_sum, LoadA&& load_a, LoadB&& load_b) {
  constexpr int kSlices = Sum::kColBlocks / 2;
#pragma unroll kUnrolled
  for (int step = 0; step < kSteps; ++step) {
    Factors<Element> r_a[Sum::kRowBlocks];
#pragma unroll
    for (int a = 0; a < Sum::kRowBlocks; ++a) {
      load_a(r_a[a].r, step, a);
      r_a[a].prepare();
    }
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      Factors<Element> r_b;
      load_b(r_b.r, step, slice * Sum::kSliceStride);
      r_b.prepare();
#pragma unroll
      for (int a = 0; a < Sum::kRowBlocks; ++a) {
        multiply(r_sum.r[a][2 * slice], r_a[a], r_b, 0);
        multiply(r_sum.r[a][2 * slice + 1], r_a[a], r_b, 1);
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
  constexpr int kSteps = kDepth / kStepDepth<Element>;
  accumulate<Element, kSteps, kStepsAtOnce<Element, kSteps>>(
      r_sum,
      [&](uint32_t (&r_a)[4], int step, int block) {
        a.load(r_a, block * Sum::kRowStride, step * kStepDepth<Element>);
      },
      [&](uint32_t (&r_b)[4], int step, int col) { b.load(r_b, col, step * kStepDepth<Element>); });
}

// sum += a b: a in registers (rows, depth), with columns b_col .. of s_b (depth, .).
template <typename Element, int kRows, int kCols, int kDepth, typename Sum>
FA_DEVICE void accumulate_ab(Sum& r_sum, const OperandA<Element, kRows, kDepth>& r_rows,
                             const SmemTile<Element, kDepth, kCols>& s_b, int b_col) {
  const auto b = OperandOrderPointer<SmemTile<Element, kDepth, kCols>>::down_first(s_b, 0, b_col);
  constexpr int kSteps = kDepth / kStepDepth<Element>;
  accumulate<Element, kSteps, kSteps>(
      r_sum,
      [&](uint32_t (&r_a)[4], int step, int block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          r_a[i] = r_rows.r[block][step][i];
        }
      },
      [&](uint32_t (&r_b)[4], int step, int col) {
        b.load_transposed(r_b, step * kStepDepth<Element>, col);
      });
}

// sum += a b: rows a_row .. of s_a (., depth) with columns b_col .. of s_b (depth, .).
template <typename Element, int kRowsA, int kCols, int kDepth, typename Sum>
FA_DEVICE void accumulate_ab(Sum& r_sum, const SmemTile<Element, kRowsA, kDepth>& s_a, int a_row,
                             const SmemTile<Element, kDepth, kCols>& s_b, int b_col) {
  const auto a = LanePointer<SmemTile<Element, kRowsA, kDepth>>::down_first(s_a, a_row, 0);
  const auto b = TransposingPointer<SmemTile<Element, kDepth, kCols>>::down_first(s_b, 0, b_col);
  constexpr int kSteps = kDepth / kStepDepth<Element>;
  accumulate<Element, kSteps, kStepsAtOnce<Element, kSteps>>(
      r_sum,
      [&](uint32_t (&r_a)[4], int step, int block) {
        a.load(r_a, block * Sum::kRowStride, step * kStepDepth<Element>);
      },
      [&](uint32_t (&r_b)[4], int step, int col) {
        b.load_transposed(r_b, step * kStepDepth<Element>, col);
      });
}

// sum += a^T b: columns a_col .. of s_a (depth, .) with columns b_col .. of s_b (depth, .).
template <typename Element, int kColsA, int kColsB, int kDepth, typename Sum>
FA_DEVICE void accumulate_atb(Sum& r_sum, const SmemTile<Element, kDepth, kColsA>& s_a, int a_col,
                              const SmemTile<Element, kDepth, kColsB>& s_b, int b_col) {
  const auto a = TransposingPointer<SmemTile<Element, kDepth, kColsA>>::right_first(s_a, 0, a_col);
  const auto b = TransposingPointer<SmemTile<Element, kDepth, kColsB>>::down_first(s_b, 0, b_col);
  constexpr int kSteps = kDepth / kStepDepth<Element>;
  accumulate<Element, kSteps, kStepsAtOnce<Element, kSteps>>(
      r_sum,
      [&](uint32_t (&r_a)[4], int step, int block) {
        a.load_transposed(r_a, step * kStepDepth<Element>, block * Sum::kRowStride);
      },
      [&](uint32_t (&r_b)[4], int step, int col) {
        b.load_transposed(r_b, step * kStepDepth<Element>, col);
      });
}

}  // namespace fa::device
