// SPDX-License-Identifier: BSD-3-Clause
// A (kRows, kCols) tile of 16-bit elements in shared memory, swizzled by 128 bytes: the columns are
// cut into panels of 64 (one 128-byte line per row), and within a line the 16-byte unit u of row r
// lies at u ^ (r % 8). Eight rows of one column block then lie in eight different bank groups, so
// ldmatrix and the 16-byte copies have no bank conflicts.
#pragma once

#include "common/params.h"
#include "ptx/common.cuh"
#include "ptx/cp_async.cuh"

namespace fa::device {

// The rows of one head from some row on. Beyond `rows` and `cols` nothing may be touched.
template <typename Element>
struct GlobalTile {
  Element* g_first;
  int64_t row_stride;
  int rows;
  int cols;

  FA_DEVICE Element* at(int row, int col) const { return g_first + row * row_stride + col; }
};

// The rows first_row .. seqlen of (batch, head), as many of them as a tile takes.
template <typename Element>
FA_DEVICE GlobalTile<Element> global_tile(const TensorView& view, int batch, int first_row,
                                          int head, int seqlen, int head_dim) {
  return {view.row<Element>(batch, first_row, head), view.row_stride, seqlen - first_row, head_dim};
}

template <typename Element, int kRows, int kCols>
struct SmemTile {
  static constexpr int kPanelCols = 64;
  static constexpr int kUnitElements = 16 / sizeof(Element);
  static constexpr int kUnitsPerRow = kCols / kUnitElements;
  static constexpr int kSwizzleRows = 8;
  static_assert(sizeof(Element) == 2 && kCols % kPanelCols == 0 && kRows % kSwizzleRows == 0);

  alignas(128) Element elements[kRows * kCols];

  static FA_HOST_DEVICE constexpr int offset(int row, int col) {
    const int panel = col / kPanelCols;
    const int unit = col % kPanelCols / kUnitElements;
    return (panel * kRows + row) * kPanelCols + (unit ^ (row % kSwizzleRows)) * kUnitElements +
           col % kUnitElements;
  }

  // The element `rows` below and `cols` to the right of the one at `offset`, where rows is a
  // multiple of the swizzle and cols does not carry into the bits of the column at `offset`. With
  // constant steps the address is one of a few registers plus an immediate, while offset(row, col)
  // would cost a register for every address of an unrolled loop.
  static FA_HOST_DEVICE constexpr int step(int offset, int rows, int cols) {
    return (offset ^ (cols % kPanelCols)) + (cols / kPanelCols * kRows + rows) * kPanelCols;
  }

  FA_DEVICE Element* at(int row, int col) { return elements + offset(row, col); }

  // Begins to copy the tile, by all kThreads of the block; ends with cp_async_wait_all and a
  // barrier. Rows and columns that do not exist become zero, so that whatever lies there in global
  // memory, NaN included, is never multiplied.
  template <int kThreads>
  FA_DEVICE void load_async(const GlobalTile<Element>& source) {
    constexpr int kRowsPerStep = kThreads / kUnitsPerRow;
    static_assert(kThreads % kUnitsPerRow == 0 && kRows % kRowsPerStep == 0 &&
                  kRowsPerStep % kSwizzleRows == 0);
    const int row = static_cast<int>(threadIdx.x) / kUnitsPerRow;
    const int col = static_cast<int>(threadIdx.x) % kUnitsPerRow * kUnitElements;
    const int first = offset(row, col);
    const int rows = col < source.cols ? source.rows - row : 0;
    const Element* g_unit = source.at(row, col);
#pragma unroll
    for (int below = 0; below < kRows; below += kRowsPerStep) {
      ptx::cp_async_16(elements + step(first, below, 0), g_unit, below < rows);
      g_unit += kRowsPerStep * source.row_stride;
    }
  }
};

// The dynamic shared memory of the block as the struct that lays it out.
template <typename Plan>
FA_DEVICE Plan& shared_memory() {
  extern __shared__ __align__(128) unsigned char s_memory[];
  static_assert(alignof(Plan) <= 128);
  return *reinterpret_cast<Plan*>(s_memory);
}

}  // namespace fa::device
