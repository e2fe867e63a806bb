// SPDX-License-Identifier: BSD-3-Clause
// A matrix transposed among the lanes of a warp.
#pragma once

#include "ptx/common.cuh"

namespace fa::ptx {

// Of an 8x8 matrix of 16-bit elements each lane has the two at (lane / 4, 2 * (lane % 4)), and
// receives those of the transposed one.
// PTX ISA, "Warp Level Matrix Transpose Instruction: movmatrix".
FA_DEVICE uint32_t transpose_8x8(uint32_t r_pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(r_pair));
  return transposed;
}

}  // namespace fa::ptx
