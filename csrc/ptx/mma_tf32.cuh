// SPDX-License-Identifier: BSD-3-Clause
// The tensor core instruction for 32-bit factors (compute capability 8.0). Register layouts:
// device/fragment.cuh.
#pragma once

#include "ptx/common.cuh"

namespace fa::ptx {

// A float that is multiplied as TF32: with 11 significant bits.
struct Tf32 {
  float value;

  Tf32() = default;
  explicit constexpr FA_HOST_DEVICE Tf32(float x) : value(x) {}
  explicit constexpr FA_HOST_DEVICE operator float() const { return value; }
};

// d (16, 8) += a (16, 8) b (8, 8) in float, the factors as TF32: their 13 low bits count for
// nothing. Sums are truncated, not rounded.
// PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions: mma", shape .m16n8k8, .tf32.
FA_DEVICE void mma_m16n8k8_tf32(float (&r_d)[4], const uint32_t (&r_a)[4], uint32_t r_b0,
                                uint32_t r_b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(r_d[0]), "+f"(r_d[1]), "+f"(r_d[2]), "+f"(r_d[3])
      : "r"(r_a[0]), "r"(r_a[1]), "r"(r_a[2]), "r"(r_a[3]), "r"(r_b0), "r"(r_b1));
}

}  // namespace fa::ptx
