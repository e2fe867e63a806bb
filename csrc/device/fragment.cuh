// SPDX-License-Identifier: BSD-3-Clause
// What the lanes of a warp hold of a matrix. The only file that knows lane arithmetic.
//
// Accumulator (16, kCols): register i of 8-column block b is the element at
//   row = lane / 4 + 8 * (i / 2),  col = 8 * b + 2 * (lane % 4) + i % 2.
// A thread so holds two rows, and the four lanes of a quad hold a row together. An A operand
// (16, kDepth) has, per 16 columns, the registers of two such blocks in pairs of 16-bit elements; a
// B operand (16, 8) is the transpose of an 8x16 half of that.
#pragma once

#include "device/smem.cuh"
#include "ptx/mma_sm80.cuh"

namespace fa::device {

inline constexpr int kWarpRows = 16;  // rows of an accumulator and of an A operand
inline constexpr int kBlockCols = 8;  // columns of one mma
inline constexpr int kMmaDepth = 16;  // products summed by one mma
inline constexpr int kRowsPerThread = 2;

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

template <int kColsOfTile>
struct Accumulator {
  static constexpr int kCols = kColsOfTile;
  static constexpr int kBlocks = kCols / kBlockCols;

  float r[kBlocks][4];

  static FA_DEVICE constexpr int row_of_thread(int i) { return i / 2; }

  // Replaces each element by map(element, row_of_thread, block, i).
  template <typename Map>
  FA_DEVICE void transform(Map&& map) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        r[block][i] = map(r[block][i], row_of_thread(i), block, i);
      }
    }
  }

  FA_DEVICE void clear() {
    transform([](float, int, int, int) { return 0.0f; });
  }

  FA_DEVICE void scale(float factor) {
    transform([&](float x, int, int, int) { return x * factor; });
  }

  FA_DEVICE void scale_rows(const float (&factor)[kRowsPerThread]) {
    transform([&](float x, int row, int, int) { return x * factor[row]; });
  }
};

template <typename Element, int kDepth>
struct OperandA {
  uint32_t r[kDepth / kMmaDepth][4];

  // Flips the sign bit of both elements of each register.
  FA_DEVICE void negate() {
#pragma unroll
    for (auto& block : r) {
#pragma unroll
      for (uint32_t& pair : block) {
        pair ^= 0x80008000u;
      }
    }
  }
};

// The lanes' rows of 8x8 matrices for ldmatrix. The offset is that of the block at (0, 0) of a
// tile. Blocks follow one another first down, then right,
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

// In the three loads, `row` is a multiple of 8 and `col` of 16.

// The A operand at rows row .. row + 15, columns col .. col + 15.
template <typename Tile>
FA_DEVICE void load_a(uint32_t (&r_a)[4], const Tile& s_tile, int row, int col) {
  ptx::ldmatrix_x4(r_a, s_tile.elements + Tile::step(offset_down_first<Tile>(), row, col));
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
