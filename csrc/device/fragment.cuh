// SPDX-License-Identifier: BSD-3-Clause
// What the lanes of a warp hold of a matrix. The only file that knows lane arithmetic.
//
// Accumulator (kRows, kCols): register i of 8-column block b of 16-row block a is the element at
//   row = 16 * a + lane / 4 + 8 * (i / 2),  col = 8 * b + 2 * (lane % 4) + i % 2.
// A thread so holds two rows of every 16, and the four lanes of a quad hold a row together. An A
// operand (16, 16) has the registers of two such blocks in pairs of 16-bit elements; a B operand
// (16, 8) is the transpose of an 8x16 half of that.
#pragma once

#include "device/smem.cuh"
#include "ptx/mma_sm80.cuh"

namespace fa::device {

inline constexpr int kBlockRows = 16;  // rows of one mma
inline constexpr int kBlockCols = 8;   // columns of one mma
inline constexpr int kMmaDepth = 16;   // products summed by one mma

FA_DEVICE int accumulator_row(int row_of_thread) {
  return ptx::lane_index() / 4 + 8 * row_of_thread;
}

FA_DEVICE int accumulator_col(int block, int i) {
  return kBlockCols * block + 2 * (ptx::lane_index() % 4) + i % 2;
}

// One lane of the four that share a row.
FA_DEVICE bool leads_row() { return ptx::lane_index() % 4 == 0; }

FA_DEVICE float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
  return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

FA_DEVICE float row_sum(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

template <int kRowsOfTile, int kColsOfTile>
struct Accumulator {
  static constexpr int kRows = kRowsOfTile;
  static constexpr int kCols = kColsOfTile;
  static constexpr int kRowBlocks = kRows / kBlockRows;
  static constexpr int kColBlocks = kCols / kBlockCols;
  static constexpr int kRowsPerThread = 2 * kRowBlocks;
  static_assert(kRows % kBlockRows == 0 && kCols % (2 * kBlockCols) == 0);

  // One value for each row that a thread holds.
  using RowValues = float[kRowsPerThread];

  float r[kRowBlocks][kColBlocks][4];

  // Replaces each element by map(element, row_of_thread, col_block, i).
  template <typename Map>
  FA_DEVICE void transform(Map&& map) {
#pragma unroll
    for (int a = 0; a < kRowBlocks; ++a) {
#pragma unroll
      for (int b = 0; b < kColBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          r[a][b][i] = map(r[a][b][i], 2 * a + i / 2, b, i);
        }
      }
    }
  }

  FA_DEVICE void clear() {
    transform([](float, int, int, int) { return 0.0f; });
  }

  FA_DEVICE void scale(float factor) {
    transform([&](float x, int, int, int) { return x * factor; });
  }

  FA_DEVICE void scale_rows(const RowValues& factor) {
    transform([&](float x, int row, int, int) { return x * factor[row]; });
  }
};

// A operands of a (kRows, kDepth) matrix.
template <typename Element, int kRows, int kDepth>
struct OperandA {
  uint32_t r[kRows / kBlockRows][kDepth / kMmaDepth][4];
};

// The lanes' rows of 8x8 matrices for ldmatrix: where lane i points, relative to a 16x16 block.
// Blocks of 8x8 follow one another first down, then right,
template <typename Tile>
FA_DEVICE int offset_down_first() {
  const int lane = ptx::lane_index();
  return Tile::offset(lane % 16, lane / 16 * 8);
}

// or first right, then down.
template <typename Tile>
FA_DEVICE int offset_right_first() {
  const int lane = ptx::lane_index();
  return Tile::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8);
}

// In the four loads, `row` is a multiple of 8 and `col` of 16.

// The A operand at rows row .. row + 15, columns col .. col + 15 of a tile.
template <typename Tile>
FA_DEVICE void load_a(uint32_t (&r_a)[4], const Tile& s_tile, int row, int col) {
  ptx::ldmatrix_x4(r_a, s_tile.elements + Tile::step(offset_down_first<Tile>(), row, col));
}

// The A operand that is the transpose of rows row .. row + 15, columns col .. col + 15 of a tile.
template <typename Tile>
FA_DEVICE void load_a_of_transposed(uint32_t (&r_a)[4], const Tile& s_tile, int row, int col) {
  ptx::ldmatrix_x4_trans(r_a, s_tile.elements + Tile::step(offset_right_first<Tile>(), row, col));
}

// Two B operands from a tile that holds B transposed: element (k, n) of B at (n, k) of the tile.
// r_b[0..1] are for n = row .. row + 7, r_b[2..3] for the next eight; k = col .. col + 15.
template <typename Tile>
FA_DEVICE void load_b_of_transposed(uint32_t (&r_b)[4], const Tile& s_tile, int row, int col) {
  ptx::ldmatrix_x4(r_b, s_tile.elements + Tile::step(offset_right_first<Tile>(), row, col));
}

// Two B operands from a tile that holds B: element (k, n) of B at (k, n) of the tile.
// r_b[0..1] are for n = col .. col + 7, r_b[2..3] for the next eight; k = row .. row + 15.
template <typename Tile>
FA_DEVICE void load_b(uint32_t (&r_b)[4], const Tile& s_tile, int row, int col) {
  ptx::ldmatrix_x4_trans(r_b, s_tile.elements + Tile::step(offset_down_first<Tile>(), row, col));
}

}  // namespace fa::device
