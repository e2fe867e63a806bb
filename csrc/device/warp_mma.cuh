// SPDX-License-Identifier: BSD-3-Clause
// Products of a warp's 16 rows with a tile in shared memory, accumulated in float.
#pragma once

#include "device/fragment.cuh"

namespace fa::device {

// The warp's 16 rows of a tile, from `row` on, as an A operand that stays in registers.
template <typename Element, int kRows, int kDepth>
FA_DEVICE OperandA<Element, kDepth> load_rows(const SmemTile<Element, kRows, kDepth>& s_tile,
                                              int row) {
  OperandA<Element, kDepth> r_rows;
#pragma unroll
  for (int step = 0; step < kDepth / kMmaDepth; ++step) {
    load_a(r_rows.r[step], s_tile, row, step * kMmaDepth);
  }
  return r_rows;
}

// One depth step of sum (16, kCols) += a b^T, b (kCols, kDepth).
template <typename Element, int kCols, int kDepth>
FA_DEVICE void accumulate_abt_step(Accumulator<kCols>& r_sum, const uint32_t (&r_a)[4],
                                   const SmemTile<Element, kCols, kDepth>& s_b, int step) {
#pragma unroll
  for (int pair = 0; pair < kCols / (2 * kBlockCols); ++pair) {
    uint32_t r_b[4];
    load_b_of_transposed(r_b, s_b, pair * 2 * kBlockCols, step * kMmaDepth);
    ptx::mma_m16n8k16<Element>(r_sum.r[2 * pair], r_a, r_b[0], r_b[1]);
    ptx::mma_m16n8k16<Element>(r_sum.r[2 * pair + 1], r_a, r_b[2], r_b[3]);
  }
}

// sum (16, kCols) += a b^T for a (16, kDepth) in registers and b (kCols, kDepth).
template <typename Element, int kCols, int kDepth>
FA_DEVICE void accumulate_abt(Accumulator<kCols>& r_sum, const OperandA<Element, kDepth>& r_a,
                              const SmemTile<Element, kCols, kDepth>& s_b) {
#pragma unroll
  for (int step = 0; step < kDepth / kMmaDepth; ++step) {
    accumulate_abt_step(r_sum, r_a.r[step], s_b, step);
  }
}

// sum (16, kCols) += a b^T for rows a_row .. a_row + 15 of a (kRows, kDepth) and b (kCols, kDepth).
template <typename Element, int kRows, int kCols, int kDepth>
FA_DEVICE void accumulate_abt(Accumulator<kCols>& r_sum,
                              const SmemTile<Element, kRows, kDepth>& s_a, int a_row,
                              const SmemTile<Element, kCols, kDepth>& s_b) {
#pragma unroll
  for (int step = 0; step < kDepth / kMmaDepth; ++step) {
    uint32_t r_a[4];
    load_a(r_a, s_a, a_row, step * kMmaDepth);
    accumulate_abt_step(r_sum, r_a, s_b, step);
  }
}

// sum (16, kCols) += a b for a (16, kDepth) in registers and b (kDepth, kCols).
template <typename Element, int kCols, int kDepth>
FA_DEVICE void accumulate_ab(Accumulator<kCols>& r_sum, const OperandA<Element, kDepth>& r_a,
                             const SmemTile<Element, kDepth, kCols>& s_b) {
#pragma unroll
  for (int step = 0; step < kDepth / kMmaDepth; ++step) {
#pragma unroll
    for (int pair = 0; pair < kCols / (2 * kBlockCols); ++pair) {
      uint32_t r_b[4];
      load_b(r_b, s_b, step * kMmaDepth, pair * 2 * kBlockCols);
      ptx::mma_m16n8k16<Element>(r_sum.r[2 * pair], r_a.r[step], r_b[0], r_b[1]);
      ptx::mma_m16n8k16<Element>(r_sum.r[2 * pair + 1], r_a.r[step], r_b[2], r_b[3]);
    }
  }
}

}  // namespace fa::device
