// SPDX-License-Identifier: BSD-3-Clause
// A (kRows, kCols) tile of 16-bit or 32-bit elements in shared memory. The columns are cut into
// panels of 128 bytes (or of 64 or 32 where kCols is no multiple of that); a panel is kRows lines,
// and within it the 16-byte units are permuted such that eight rows of one unit column lie in eight
// different bank groups: ldmatrix and the 16-byte copies then have no bank conflicts.
#pragma once

#include "device/global_tile.cuh"
#include "ptx/cp_async.cuh"

namespace fa::device {

template <typename Element, int kRowsOfTile, int kColsOfTile>
struct SmemTile {
  static constexpr int kRows = kRowsOfTile;
  static constexpr int kCols = kColsOfTile;
  static constexpr int kLineElements = 128 / sizeof(Element);
  static constexpr int kPanelCols = kCols % kLineElements == 0         ? kLineElements
                                    : kCols % (kLineElements / 2) == 0 ? kLineElements / 2
                                                                       : kLineElements / 4;
  static constexpr int kPanels = kCols / kPanelCols;
  static constexpr int kUnitElements = 16 / sizeof(Element);
  static constexpr int kUnitsPerLine = kPanelCols / kUnitElements;
  static constexpr int kBankGroups = 8;  // of 16 bytes
  static constexpr int kSwizzleRows = 8;
  static constexpr bool kIsWide = sizeof(Element) == 4;
  static_assert(sizeof(Element) == 2 || kIsWide);
  static_assert(kCols % kPanelCols == 0 && kRows % kSwizzleRows == 0);

  alignas(128) Element elements[kRows * kCols];

  // What the units of a row are permuted by, bit by bit of the row. 32-bit elements are also read
  // and written in 8 columns of 4 rows: rows (0, 1, 2, 3) + 4 i and (0, 2, 4, 6) + i differ
  // in more than the lowest bit.
  static FA_HOST_DEVICE constexpr int swizzle(int row) {
    const int order =
        kIsWide ? (row >> 1 & 1) << 2 | ((row ^ row >> 2) & 1) << 1 | (row >> 2 & 1) : row;
    return order / (kBankGroups / kUnitsPerLine) % kUnitsPerLine;
  }

  static FA_HOST_DEVICE constexpr int offset(int row, int col) {
    const int panel = col / kPanelCols;
    const int unit = col % kPanelCols / kUnitElements;
    return (panel * kRows + row) * kPanelCols + (unit ^ swizzle(row)) * kUnitElements +
           col % kUnitElements;
  }

  // The element `rows` below and `cols` to the right of the one at `offset`, where rows is a
  // multiple of the swizzle and cols does not carry into the bits of the column at `offset`. With
  // constant steps the address is one of a few registers plus an immediate, while offset(row, col)
  // would cost a register for every address of an unrolled loop.
  static FA_HOST_DEVICE constexpr int step(int offset, int rows, int cols) {
    return (offset ^ (cols % kPanelCols)) + (cols / kPanelCols * kRows + rows) * kPanelCols;
  }

  // Visits the thread's share of the tile's 16-byte units as visit(unit, rows, panel): the unit
  // lies at elements + unit, `rows` lines and `panel` panels after the thread's first. The threads
  // of the block share the tile so that neighbours have neighbouring units of a line.
  template <int kThreads, typename Visit>
  static FA_DEVICE void for_each_unit(Visit&& visit) {
    constexpr int kLinesPerStep = kThreads / kUnitsPerLine;
    static_assert(kThreads % kUnitsPerLine == 0 && kLinesPerStep % kSwizzleRows == 0);
    const int first = offset(first_row(), first_col());
#pragma unroll
    for (int rows = 0; rows < kRows; rows += kLinesPerStep) {
      if (kRows % kLinesPerStep == 0 || first_row() + rows < kRows) {
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          visit(step(first, rows, panel * kPanelCols), rows, panel);
        }
      }
    }
  }

  // Where the thread's first unit lies.
  static FA_DEVICE int first_row() {
    return static_cast<int>(ptx::opaque(threadIdx.x)) / kUnitsPerLine;
  }
  static FA_DEVICE int first_col() {
    return static_cast<int>(ptx::opaque(threadIdx.x)) % kUnitsPerLine * kUnitElements;
  }

  // Begins to copy the tile, by all kThreads of the block; ends with a wait for cp.async and a
  // barrier. Rows and columns that do not exist become zero, so that whatever lies there in global
  // memory, NaN included, is never multiplied.
  template <int kThreads>
  FA_DEVICE void load_async(const GlobalTile<Element>& source) {
    const Element* g_line = source.at(first_row(), first_col());
    const int rows_left = source.rows - first_row();
    const int cols_left = source.cols - first_col();
    int line = 0;
    for_each_unit<kThreads>([&](int unit, int rows, int panel) {
      if (rows != line) {
        g_line += (rows - line) * source.row_stride;
        line = rows;
      }
      ptx::cp_async_16(elements + unit, g_line + panel * kPanelCols,
                       rows < rows_left && panel * kPanelCols < cols_left);
    });
  }

  // Flips the signs of what this thread loaded.
  template <int kThreads>
  FA_DEVICE void negate() {
    for_each_unit<kThreads>([&](int unit, int, int) {
      uint4& bits = *reinterpret_cast<uint4*>(elements + unit);
      constexpr uint32_t kSigns = kIsWide ? 0x80000000u : 0x80008000u;
      bits = {bits.x ^ kSigns, bits.y ^ kSigns, bits.z ^ kSigns, bits.w ^ kSigns};
    });
  }

  // Copies the tile to global memory, by all kThreads of the block.
  template <int kThreads>
  FA_DEVICE void store(const GlobalTile<Element>& destination) const {
    Element* g_line = destination.at(first_row(), first_col());
    const int rows_left = destination.rows - first_row();
    const int cols_left = destination.cols - first_col();
    int line = 0;
    for_each_unit<kThreads>([&](int unit, int rows, int panel) {
      if (rows != line) {
        g_line += (rows - line) * destination.row_stride;
        line = rows;
      }
      const uint4 bits = *reinterpret_cast<const uint4*>(elements + unit);
      if (rows < rows_left && panel * kPanelCols < cols_left) {
        *reinterpret_cast<uint4*>(g_line + panel * kPanelCols) = bits;
      }
    });
  }
};

// The dynamic shared memory of the block as the struct that lays it out.
template <typename Plan>
FA_DEVICE Plan& shared_memory() {
  if constexpr (alignof(Plan) <= 128) {
    extern __shared__ __align__(128) unsigned char s_memory[];
    return *reinterpret_cast<Plan*>(s_memory);
  } else {
    extern __shared__ __align__(1024) unsigned char s_aligned_memory[];
    static_assert(alignof(Plan) == 1024);
    return *reinterpret_cast<Plan*>(s_aligned_memory);
  }
}

}  // namespace fa::device
