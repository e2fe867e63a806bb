// SPDX-License-Identifier: BSD-3-Clause
// The tensor core instructions of compute capability 8.0. Register layouts: device/fragment.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx/common.cuh"

namespace fa::ptx {

// Loads four 8x8 matrices of 16-bit elements. Lane i gives the address of row i % 8 of matrix
// i / 8 and receives, of each matrix, the two elements at (lane / 4, 2 * (lane % 4)).
// PTX ISA, "Warp Level Matrix Load Instruction: ldmatrix".
FA_DEVICE void ldmatrix_x4(uint32_t (&r_matrices)[4], uint32_t s_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r_matrices[0]), "=r"(r_matrices[1]), "=r"(r_matrices[2]), "=r"(r_matrices[3])
               : "r"(s_row)
               : "memory");
}

// The same, but each matrix arrives transposed.
// PTX ISA, "Warp Level Matrix Load Instruction: ldmatrix", qualifier .trans.
FA_DEVICE void ldmatrix_x4_trans(uint32_t (&r_matrices)[4], uint32_t s_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r_matrices[0]), "=r"(r_matrices[1]), "=r"(r_matrices[2]), "=r"(r_matrices[3])
               : "r"(s_row)
               : "memory");
}

template <typename Element>
FA_DEVICE void mma_m16n8k16(float (&r_d)[4], const uint32_t (&r_a)[4], uint32_t r_b0,
                            uint32_t r_b1);

// d (16, 8) += a (16, 16) b (16, 8) in float.
// PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions: mma", shape .m16n8k16, .bf16.
template <>
FA_DEVICE void mma_m16n8k16<__nv_bfloat16>(float (&r_d)[4], const uint32_t (&r_a)[4], uint32_t r_b0,
                                           uint32_t r_b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(r_d[0]), "+f"(r_d[1]), "+f"(r_d[2]), "+f"(r_d[3])
      : "r"(r_a[0]), "r"(r_a[1]), "r"(r_a[2]), "r"(r_a[3]), "r"(r_b0), "r"(r_b1));
}

// PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions: mma", shape .m16n8k16, .f16.
template <>
FA_DEVICE void mma_m16n8k16<__half>(float (&r_d)[4], const uint32_t (&r_a)[4], uint32_t r_b0,
                                    uint32_t r_b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(r_d[0]), "+f"(r_d[1]), "+f"(r_d[2]), "+f"(r_d[3])
      : "r"(r_a[0]), "r"(r_a[1]), "r"(r_a[2]), "r"(r_a[3]), "r"(r_b0), "r"(r_b1));
}

// Two floats to 16-bit elements in one register, `low` in its low half, rounded to nearest even.
template <typename Element>
FA_DEVICE uint32_t convert_pair(float low, float high);

// PTX ISA, "Data Movement and Conversion Instructions: cvt", .bf16x2.
template <>
FA_DEVICE uint32_t convert_pair<__nv_bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// PTX ISA, "Data Movement and Conversion Instructions: cvt", .f16x2.
template <>
FA_DEVICE uint32_t convert_pair<__half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace fa::ptx
