// SPDX-License-Identifier: BSD-3-Clause
// Products of a warpgroup, with wgmma: issued here, and complete after a commit and a wait. Tiles
// in shared memory are SmemTiles with panels of 64 columns, which is the layout that wgmma and TMA
// call 128-byte swizzle: a pattern of 8 rows of 128 bytes.
#pragma once

#include "device/fragment.cuh"
#include "device/smem.cuh"
#include "ptx/wgmma.cuh"

namespace fa::device {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWarpgroupRows = 64;

// Where an operand lies in shared memory. Of the descriptor's halves the upper one is the same for
// all tiles. PTX ISA, "wgmma: Matrix Descriptor Format".
template <typename Tile>
class Descriptor {
 public:
  FA_DEVICE Descriptor(const Tile& s_tile, int row) {
    constexpr uint32_t kPanelBytes = Tile::kRows * kLineBytes;  // from 64 columns to the next 64
    const uint32_t address = ptx::smem_address(s_tile.elements) + row * kLineBytes;
    lower_ = (kPanelBytes >> 4) << 16 | (address & 0x3FFFF) >> 4;
  }

  // Of the operand so many rows below and columns to the right; constants.
  FA_DEVICE uint64_t at(int rows, int cols) const {
    const uint32_t bytes = (cols / 64 * Tile::kRows + rows) * kLineBytes + cols % 64 * 2;
    return static_cast<uint64_t>(kUpper) << 32 | (lower_ + (bytes >> 4));
  }

 private:
  static constexpr uint32_t kLineBytes = 128;
  static constexpr uint32_t kPatternBytes = 8 * kLineBytes;  // from 8 rows to the next 8
  static constexpr uint32_t kSwizzle128 = 1u << 30;
  static constexpr uint32_t kUpper = kSwizzle128 | kPatternBytes >> 4;
  static_assert(Tile::kPanelCols == 64);

  uint32_t lower_;
};

// sum = a b^T over the first kDepth columns: rows a_row .. of s_a with rows b_row .. of s_b.
template <int kDepth, typename Sum, typename Element, int kRowsA, int kRowsB, int kCols>
FA_DEVICE void issue_abt(Sum& r_sum, const SmemTile<Element, kRowsA, kCols>& s_a, int a_row,
                         const SmemTile<Element, kRowsB, kCols>& s_b, int b_row = 0) {
  const Descriptor a(s_a, a_row);
  const Descriptor b(s_b, b_row);
#pragma unroll
  for (int col = 0; col < kDepth; col += kMmaDepth) {
    ptx::Wgmma<Element, Sum::kCols>::ss(r_sum.r[0], a.at(0, col), b.at(0, col), col > 0);
  }
}

// sum (+)= a b: a in registers (64, depth), with the first rows and columns of s_b.
template <typename Sum, typename Element, int kDepth, int kRows, int kCols>
FA_DEVICE void issue_ab(Sum& r_sum, const OperandA<Element, kBlockRows, kDepth>& r_a,
                        const SmemTile<Element, kRows, kCols>& s_b, bool accumulate) {
  const Descriptor b(s_b, 0);
#pragma unroll
  for (int row = 0; row < kDepth; row += kMmaDepth) {
    ptx::Wgmma<Element, Sum::kCols>::rs(r_sum.r[0], r_a.r[0][row / kMmaDepth], b.at(row, 0),
                                        accumulate || row > 0);
  }
}

// sum = a^T b over the rows of s_a, which are kDepth and its columns 64, with as many rows of s_b
// and its columns from b_col on, a multiple of 64.
template <typename Sum, typename Element, int kDepth, int kRowsB, int kColsB>
FA_DEVICE void issue_atb(Sum& r_sum, const SmemTile<Element, kDepth, kWarpgroupRows>& s_a,
                         const SmemTile<Element, kRowsB, kColsB>& s_b, int b_col) {
  const Descriptor a(s_a, 0);
  const Descriptor b(s_b, b_col / 64 * kRowsB);
#pragma unroll
  for (int row = 0; row < kDepth; row += kMmaDepth) {
    ptx::Wgmma<Element, Sum::kCols>::template ss<true, true>(r_sum.r[0], a.at(row, 0), b.at(row, 0),
                                                             row > 0);
  }
}

// sum (+)= a b over kDepth columns of s_a: rows of it from a_row on, with the first rows of s_b and
// its columns from b_col on. A sum of more than 64 columns has all columns of s_b. It may be made
// of products of fewer columns, kColsAtOnce: ptxas takes none with more registers of results than a
// thread has when the kernel begins.
template <int kDepth, int kColsAtOnce = 0, typename Sum, typename Element, int kRowsA, int kColsA,
          int kRowsB, int kColsB>
FA_DEVICE void issue_ab(Sum& r_sum, const SmemTile<Element, kRowsA, kColsA>& s_a, int a_row,
                        const SmemTile<Element, kRowsB, kColsB>& s_b, int b_col,
                        bool accumulate = false) {
  static_assert(Sum::kCols <= 64 || Sum::kCols == kColsB);
  const Descriptor a(s_a, a_row);
  const Descriptor b(s_b, b_col / 64 * kRowsB);
  constexpr int kCols = kColsAtOnce == 0 ? Sum::kCols : kColsAtOnce;
  using Block = float[4];
#pragma unroll
  for (int col = 0; col < Sum::kCols; col += kCols) {
    auto& r_part = reinterpret_cast<Block(&)[kCols / kBlockCols]>(r_sum.r[0][col / kBlockCols]);
#pragma unroll
    for (int depth = 0; depth < kDepth; depth += kMmaDepth) {
      ptx::Wgmma<Element, kCols>::template ss<true>(r_part, a.at(0, depth), b.at(depth, col),
                                                    accumulate || depth > 0);
    }
  }
}

}  // namespace fa::device
