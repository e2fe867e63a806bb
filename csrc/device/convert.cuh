// SPDX-License-Identifier: BSD-3-Clause
// Between the elements of tensors and the floats of arithmetic.
#pragma once

#include "device/fragment.cuh"
#include "device/lane_pointer.cuh"
#include "ptx/mma_tf32.cuh"

namespace fa::device {

// By name: torch builds its extensions without the implicit conversions of these types.
FA_DEVICE float to_float(float x) { return x; }
FA_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
FA_DEVICE float to_float(__half x) { return __half2float(x); }

template <typename Element>
FA_DEVICE Element from_float(float x);
template <>
FA_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
FA_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
FA_DEVICE __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// An accumulator as the A operand of the next product. Two of its 8-column blocks are one depth
// step, and every element is already in the lane that needs it. Of 32-bit elements one block is a
// step, whose columns take another order: the even ones, then the odd ones.
template <typename Element, int kRows, int kCols>
FA_DEVICE OperandA<Element, kRows, kCols> to_operand(const Accumulator<kRows, kCols>& r_tile) {
  OperandA<Element, kRows, kCols> r_operand;
#pragma unroll
  for (int a = 0; a < r_tile.kRowBlocks; ++a) {
#pragma unroll
    for (int b = 0; b < r_tile.kColBlocks; ++b) {
      const float (&block)[4] = r_tile.r[a][b];
      if constexpr (sizeof(Element) == sizeof(float)) {
        uint32_t (&step)[4] = r_operand.r[a][b];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          step[i % 2 * 2 + i / 2] = __float_as_uint(block[i]);
        }
      } else {
        uint32_t (&step)[4] = r_operand.r[a][b / 2];
        step[b % 2 * 2] = ptx::convert_pair<Element>(block[0], block[1]);
        step[b % 2 * 2 + 1] = ptx::convert_pair<Element>(block[2], block[3]);
      }
    }
  }
  return r_operand;
}

// Two neighbours.
template <typename Element>
FA_DEVICE void store_pair(Element* s_pair, float low, float high) {
  if constexpr (sizeof(Element) == sizeof(float)) {
    *reinterpret_cast<float2*>(s_pair) = {low, high};
  } else {
    *reinterpret_cast<uint32_t*>(s_pair) = ptx::convert_pair<Element>(low, high);
  }
}

// Writes an accumulator as elements into a shared tile, its first element at (row, col): as for
// LanePointer. Eight rows of one block, or four of 32-bit elements, are one pass over all banks.
template <typename Sums, typename Element, int kTileRows, int kTileCols>
FA_DEVICE void store_elements(const Sums& r_sums, SmemTile<Element, kTileRows, kTileCols>& s_tile,
                              int row, int col) {
  using Tile = SmemTile<Element, kTileRows, kTileCols>;
  const int first = Tile::step(Tile::offset(Sums::row(0), Sums::col(0, 0)), row, col);
#pragma unroll
  for (int a = 0; a < Sums::kRowBlocks; ++a) {
#pragma unroll
    for (int b = 0; b < Sums::kColBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Element* s_pair =
            s_tile.elements + Tile::step(first, Sums::first_row(2 * a + half), Sums::first_col(b));
        store_pair(s_pair, r_sums.r[a][b][2 * half], r_sums.r[a][b][2 * half + 1]);
      }
    }
  }
}

// The same by stmatrix, which Hopper has, for a warp's 16 rows of elements.
template <typename Element, int kElementCols, int kTileRows, int kTileCols>
FA_DEVICE void store_blocks(const OperandA<Element, kBlockRows, kElementCols>& r_elements,
                            SmemTile<Element, kTileRows, kTileCols>& s_tile, int row, int col) {
  const auto s_lane =
      LanePointer<SmemTile<Element, kTileRows, kTileCols>>::down_first(s_tile, row, col);
#pragma unroll
  for (int step = 0; step < kElementCols; step += kMmaDepth) {
    s_lane.store(r_elements.r[0][step / kMmaDepth], 0, step);
  }
}

// All of them transposed: the 16 rows become columns of the tile from `col` on.
template <typename Element, int kElementCols, int kTileRows, int kTileCols>
FA_DEVICE void store_transposed(const OperandA<Element, kBlockRows, kElementCols>& r_elements,
                                SmemTile<Element, kTileRows, kTileCols>& s_tile, int col) {
  const auto s_lane =
      LanePointer<SmemTile<Element, kTileRows, kTileCols>>::right_first(s_tile, 0, col);
#pragma unroll
  for (int row = 0; row < kElementCols; row += kMmaDepth) {
    s_lane.store_transposed(r_elements.r[0][row / kMmaDepth], row, 0);
  }
}

}  // namespace fa::device
