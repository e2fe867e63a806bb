// SPDX-License-Identifier: BSD-3-Clause
// Rows of elements from a warp's registers to global memory, 16 bytes a lane, without a detour
// through shared memory.
#pragma once

#include "device/fragment.cuh"
#include "device/smem.cuh"

namespace fa::device {

// Lane i of a quad has words[j] of block j and gets the quad's four words of block i, in the order
// of the lanes: the transpose of a 4x4 matrix of words, halves of it at a time.
FA_DEVICE uint4 transpose_quad(const uint32_t (&words)[4]) {
  const bool is_odd = ptx::lane_index() % 2 != 0;
  const bool is_upper = ptx::lane_index() % 4 >= 2;
  const auto exchange = [](uint32_t& first, uint32_t& second, bool keeps_second, int distance) {
    const uint32_t received = __shfl_xor_sync(~0u, keeps_second ? first : second, distance);
    (keeps_second ? first : second) = received;
  };
  uint32_t w[4] = {words[0], words[1], words[2], words[3]};
  exchange(w[0], w[1], is_odd, 1);
  exchange(w[2], w[3], is_odd, 1);
  exchange(w[0], w[2], is_upper, 2);
  exchange(w[1], w[3], is_upper, 2);
  return {w[0], w[1], w[2], w[3]};
}

// By one warp: its 16 rows, as far as the destination has rows and columns, of which it has a
// multiple of 8. element_pair(block, half): the lane's two elements of an 8-column block, in the
// row of the upper or the lower half.
template <int kCols, typename Element, typename ElementPair>
FA_DEVICE void store_rows(const GlobalTile<Element>& destination, ElementPair&& element_pair) {
  constexpr int kBlocksAtOnce = 4;
  static_assert(kCols % (kBlocksAtOnce * kBlockCols) == 0);
  const int row = ptx::lane_index() / 4;
  const int col = ptx::lane_index() % 4 * kBlockCols;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row_of_half = row + half * (kBlockRows / 2);
    Element* g_row = destination.at(row_of_half, col);
#pragma unroll
    for (int first = 0; first < kCols / kBlockCols; first += kBlocksAtOnce) {
      const uint4 unit =
          transpose_quad({element_pair(first, half), element_pair(first + 1, half),
                          element_pair(first + 2, half), element_pair(first + 3, half)});
      if (row_of_half < destination.rows && col + first * kBlockCols < destination.cols) {
        *reinterpret_cast<uint4*>(g_row + first * kBlockCols) = unit;
      }
    }
  }
}

}  // namespace fa::device
