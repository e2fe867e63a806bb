// SPDX-License-Identifier: BSD-3-Clause
// Between the elements of tensors and the floats of arithmetic.
#pragma once

#include "device/fragment.cuh"

namespace fa::device {

// By name: torch builds its extensions without the implicit conversions of these types.
FA_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
FA_DEVICE float to_float(__half x) { return __half2float(x); }

// An accumulator as the A operand of the next product. Two of its 8-column blocks are one depth
// step, and every element is already in the lane that needs it.
template <typename Element, int kCols>
FA_DEVICE OperandA<Element, kCols> to_operand(const Accumulator<kCols>& r_tile) {
  OperandA<Element, kCols> r_operand;
#pragma unroll
  for (int step = 0; step < kCols / kMmaDepth; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float (&block)[4] = r_tile.r[2 * step + half];
      r_operand.r[step][2 * half] = ptx::convert_pair<Element>(block[0], block[1]);
      r_operand.r[step][2 * half + 1] = ptx::convert_pair<Element>(block[2], block[3]);
    }
  }
  return r_operand;
}

}  // namespace fa::device
