// SPDX-License-Identifier: BSD-3-Clause
// Products of a warpgroup, with wgmma: issued here, and complete after a commit and a wait. Tiles
// in shared memory are SmemTiles with panels of 64 columns, which is the layout that wgmma and TMA
// call 128-byte swizzle: a pattern of 8 rows of 128 bytes.
#pragma once

#include "device/fragment.cuh"
#include "ptx/wgmma.cuh"

namespace fa::device {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWarpgroupRows = 64;

// Where an operand lies in shared memory. PTX ISA, "wgmma: Matrix Descriptor Format".
template <typename Tile>
FA_DEVICE uint64_t matrix_descriptor(const Tile& s_tile, int row) {
  static_assert(Tile::kPanelCols == 64);
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kLineBytes = 128;
  constexpr uint64_t kPatternBytes = 8 * kLineBytes;          // from 8 rows to the next 8
  constexpr uint64_t kPanelBytes = Tile::kRows * kLineBytes;  // from 64 columns to the next 64
  const uint32_t address = ptx::smem_address(s_tile.elements) + row * kLineBytes;
  return kSwizzle128 | (kPatternBytes >> 4) << 32 | (kPanelBytes >> 4) << 16 |
         ((address & 0x3FFFF) >> 4);
}

// What to add to a descriptor for an operand so many rows below and columns to the right.
template <typename Tile>
FA_DEVICE constexpr uint64_t descriptor_step(int rows, int cols) {
  return ((cols / 64 * Tile::kRows + rows) * 128 + cols % 64 * 2) >> 4;
}

// sum = a b^T over the first kDepth columns: rows a_row .. of s_a with all rows of s_b.
template <int kDepth, typename Sum, typename Element, int kRowsA, int kRowsB, int kCols>
FA_DEVICE void issue_abt(Sum& r_sum, const SmemTile<Element, kRowsA, kCols>& s_a, int a_row,
                         const SmemTile<Element, kRowsB, kCols>& s_b) {
  const uint64_t a = matrix_descriptor(s_a, a_row);
  const uint64_t b = matrix_descriptor(s_b, 0);
#pragma unroll
  for (int col = 0; col < kDepth; col += kMmaDepth) {
    ptx::Wgmma<Element, kRowsB>::ss(
        r_sum.r[0], a + descriptor_step<SmemTile<Element, kRowsA, kCols>>(0, col),
        b + descriptor_step<SmemTile<Element, kRowsB, kCols>>(0, col), col > 0);
  }
}

// sum (+)= a b: a in registers (64, depth), with the first columns of s_b (depth, .).
template <typename Sum, typename Element, int kDepth, int kCols>
FA_DEVICE void issue_ab(Sum& r_sum, const OperandA<Element, kBlockRows, kDepth>& r_a,
                        const SmemTile<Element, kDepth, kCols>& s_b, bool accumulate) {
  const uint64_t b = matrix_descriptor(s_b, 0);
#pragma unroll
  for (int row = 0; row < kDepth; row += kMmaDepth) {
    ptx::Wgmma<Element, Sum::kCols>::rs(
        r_sum.r[0], r_a.r[0][row / kMmaDepth],
        b + descriptor_step<SmemTile<Element, kDepth, kCols>>(row, 0), accumulate || row > 0);
  }
}

}  // namespace fa::device
