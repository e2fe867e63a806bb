// SPDX-License-Identifier: BSD-3-Clause
// The way back of ldmatrix (mma_sm80.cuh), which Hopper has.
#pragma once

#include "ptx/common.cuh"

namespace fa::ptx {

// Stores four 8x8 matrices of 16-bit elements. Lane i gives the address of row i % 8 of matrix
// i / 8 and, of each matrix, the two elements at (lane / 4, 2 * (lane % 4)).
// PTX ISA, "Warp Level Matrix Store Instruction: stmatrix".
FA_DEVICE void stmatrix_x4(uint32_t s_row, const uint32_t (&r_matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(s_row),
               "r"(r_matrices[0]), "r"(r_matrices[1]), "r"(r_matrices[2]), "r"(r_matrices[3])
               : "memory");
}

// The same with each matrix transposed: of each, the two elements at (2 * (lane % 4), lane / 4).
// PTX ISA, "Warp Level Matrix Store Instruction: stmatrix", .trans.
FA_DEVICE void stmatrix_x4_trans(uint32_t s_row, const uint32_t (&r_matrices)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(s_row),
      "r"(r_matrices[0]), "r"(r_matrices[1]), "r"(r_matrices[2]), "r"(r_matrices[3])
      : "memory");
}

}  // namespace fa::ptx
