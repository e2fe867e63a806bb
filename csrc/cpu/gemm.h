// SPDX-License-Identifier: BSD-3-Clause
// Products of tiles. A block of the result stays in registers while the loop over the depth
// broadcasts elements of the left operand and loads vectors of the right one. Every element of the
// result is one sum in the order of the depth, wherever its tile begins.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace fa::cpu::FA_CPU_ISA {

// A matrix in memory, ld elements from row to row.
template <typename Real>
struct Tile {
  Real* data;
  int64_t ld;

  FA_CPU_INLINE Real* row(int64_t index) const { return data + index * ld; }
};

enum class Lhs { kPlain, kTransposed };    // a is (rows, depth), or (depth, rows)
enum class Result { kOverwrite, kAddTo };  // c = product, or c += product

inline constexpr int kBlockRows = FA_CPU_GEMM_ROWS;
inline constexpr int kBlockVectors = 2;

// The columns of a product come in blocks of this many; tiles are padded to it.
template <typename Real>
inline constexpr int kBlockColumns = kBlockVectors * kLanes<Real>;

// c (kRows, kBlockColumns) from a (kRows, depth) and b (depth, kBlockColumns).
template <Lhs kLhs, Result kResult, int kRows, typename Real>
FA_CPU_INLINE void multiply_block(int depth, Tile<Real> a, Tile<Real> b, Tile<Real> c) {
  Vec<Real> sum[kRows][kBlockVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
    for (int vector = 0; vector < kBlockVectors; ++vector) {
      sum[row][vector] =
          kResult == Result::kAddTo ? load(c.row(row) + vector * kLanes<Real>) : Vec<Real>{};
    }
  }
  for (int64_t index = 0; index < depth; ++index) {
    Vec<Real> right[kBlockVectors];
#pragma GCC unroll 16
    for (int vector = 0; vector < kBlockVectors; ++vector) {
      right[vector] = load(b.row(index) + vector * kLanes<Real>);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Vec<Real> left = broadcast(kLhs == Lhs::kPlain ? a.row(row)[index] : a.row(index)[row]);
#pragma GCC unroll 16
      for (int vector = 0; vector < kBlockVectors; ++vector) {
        sum[row][vector] += left * right[vector];
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
    for (int vector = 0; vector < kBlockVectors; ++vector) {
      store(c.row(row) + vector * kLanes<Real>, sum[row][vector]);
    }
  }
}

// The last block of rows, 0 < rows < kBlockRows.
template <Lhs kLhs, Result kResult, int kRows, typename Real>
void multiply_last_rows(int rows, int depth, Tile<Real> a, Tile<Real> b, Tile<Real> c) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      multiply_block<kLhs, kResult, kRows>(depth, a, b, c);
    } else {
      multiply_last_rows<kLhs, kResult, kRows - 1>(rows, depth, a, b, c);
    }
  }
}

// c (rows, columns) from a (rows, depth) and b (depth, columns); columns is a multiple of
// kBlockColumns, rows and depth are free.
template <Lhs kLhs, Result kResult, typename Real>
void multiply(int rows, int columns, int depth, Tile<Real> a, Tile<Real> b, Tile<Real> c) {
  const int64_t left_step = kLhs == Lhs::kPlain ? a.ld : 1;
  for (int column = 0; column < columns; column += kBlockColumns<Real>) {
    const Tile<Real> b_block = {b.data + column, b.ld};
    int row = 0;
    for (; row + kBlockRows <= rows; row += kBlockRows) {
      multiply_block<kLhs, kResult, kBlockRows>(depth, {a.data + row * left_step, a.ld}, b_block,
                                                {c.row(row) + column, c.ld});
    }
    multiply_last_rows<kLhs, kResult, kBlockRows - 1>(
        rows - row, depth, {a.data + row * left_step, a.ld}, b_block, {c.row(row) + column, c.ld});
  }
}

}  // namespace fa::cpu::FA_CPU_ISA
