// SPDX-License-Identifier: BSD-3-Clause
// What the lanes of a warp hold of a matrix. The only file that knows lane arithmetic.
//
// Accumulator (kRows, kCols): register i of 8-column block b of 16-row block a is the element at
//   row = first_row(2 * a + i / 2) + lane / 4,  col = first_col(b) + 2 * (lane % 4) + i % 2.
// A thread so holds two rows of every 16, and the four lanes of a quad hold a row together. Two
// column blocks are a slice of 16 columns. Row blocks and slices follow one another at strides of
// 16, or of more where warps take turns (warp_grid.cuh). An A operand (16, 16) has the registers of
// a slice in pairs of 16-bit elements; a B operand (16, 8) is the transpose of an 8x16 half of
// that. Of 32-bit elements an A operand (16, 8) has those at row lane / 4 (+ 8) and column
// lane % 4, and with 4 columns on in its last two registers.
#pragma once

#include "ptx/mma_sm80.cuh"

namespace fa::device {

inline constexpr int kBlockRows = 16;  // rows of one mma
inline constexpr int kBlockCols = 8;   // columns of one mma
inline constexpr int kMmaDepth = 16;   // products summed by one mma of 16-bit elements

// The same of any elements: 32 bytes of them.
template <typename Element>
inline constexpr int kStepDepth = 32 / sizeof(Element);

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

template <int kRowsOfTile, int kColsOfTile, int kStrideOfRows = kBlockRows,
          int kStrideOfSlices = 2 * kBlockCols>
struct Accumulator {
  static constexpr int kRows = kRowsOfTile;
  static constexpr int kCols = kColsOfTile;
  static constexpr int kRowStride = kStrideOfRows;
  static constexpr int kSliceStride = kStrideOfSlices;
  static constexpr int kRowBlocks = kRows / kBlockRows;
  static constexpr int kColBlocks = kCols / kBlockCols;
  static constexpr int kRowsPerThread = 2 * kRowBlocks;
  static_assert(kRows % kBlockRows == 0 && kCols % (2 * kBlockCols) == 0);

  // One value for each row that a thread holds.
  using RowValues = float[kRowsPerThread];

  float r[kRowBlocks][kColBlocks][4];

  // Of the row_of_thread-th row of a thread, less what depends on the lane; and the whole.
  static FA_HOST_DEVICE constexpr int first_row(int row_of_thread) {
    return row_of_thread / 2 * kRowStride + row_of_thread % 2 * (kBlockRows / 2);
  }
  static FA_DEVICE int row(int row_of_thread) {
    return first_row(row_of_thread) + ptx::lane_index() / 4;
  }

  static FA_HOST_DEVICE constexpr int first_col(int block) {
    return block / 2 * kSliceStride + block % 2 * kBlockCols;
  }
  static FA_DEVICE int col(int block, int i) {
    return first_col(block) + 2 * (ptx::lane_index() % 4) + i % 2;
  }

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

  // Calls visit(element, row_of_thread).
  template <typename Visit>
  FA_DEVICE void for_each(Visit&& visit) const {
#pragma unroll
    for (int a = 0; a < kRowBlocks; ++a) {
#pragma unroll
      for (int b = 0; b < kColBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          visit(r[a][b][i], 2 * a + i / 2);
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
  static constexpr int kCols = kDepth;
  static constexpr int kSteps = kDepth / kStepDepth<Element>;

  uint32_t r[kRows / kBlockRows][kSteps][4];

  // Into registers of its own, whatever becomes of `other`.
  FA_DEVICE void copy(const OperandA& other) {
#pragma unroll
    for (int a = 0; a < kRows / kBlockRows; ++a) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          r[a][step][i] = ptx::opaque(other.r[a][step][i]);
        }
      }
    }
  }
};

}  // namespace fa::device
