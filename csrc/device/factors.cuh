// SPDX-License-Identifier: BSD-3-Clause
// How the elements of an operand are multiplied: 16-bit ones as they are, floats by TF32 factors.
#pragma once

#include "device/fragment.cuh"
#include "ptx/mma_tf32.cuh"

namespace fa::device {

// The registers of an A operand (16, kStepDepth), or of a B operand of 16 columns, for which
// prepare() makes factors of the elements that were loaded into r.
template <typename Element>
struct Factors {
  uint32_t r[4];

  FA_DEVICE void prepare() {}
};

// Half a unit of TF32, which adds to a float's bits to round it to nearest where the low bits are
// then cut off.
inline constexpr uint32_t kHalfTf32 = 1u << 12;
inline constexpr uint32_t kTf32Bits = ~(2 * kHalfTf32 - 1);

// Rounded; what is not finite stays what it is.
template <>
struct Factors<ptx::Tf32> {
  uint32_t r[4];

  FA_DEVICE void prepare() {
#pragma unroll
    for (uint32_t& bits : r) {
      bits += fabsf(__uint_as_float(bits)) < INFINITY ? kHalfTf32 : 0;
    }
  }
};

// Split into r + small, both TF32, which together have all but the last bit of a float. Infinity
// becomes NaN.
template <>
struct Factors<float> {
  uint32_t r[4];
  uint32_t small[4];

  FA_DEVICE void prepare() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = __uint_as_float(r[i]);
      r[i] = (r[i] + kHalfTf32) & kTf32Bits;
      small[i] = __float_as_uint(x - __uint_as_float(r[i]));
    }
  }
};

// sum += a b, of half of the columns of b: 8 of them.
template <typename Element>
FA_DEVICE void multiply(float (&r_sum)[4], const Factors<Element>& a, const Factors<Element>& b,
                        int half) {
  ptx::mma_m16n8k16<Element>(r_sum, a.r, b.r[2 * half], b.r[2 * half + 1]);
}

FA_DEVICE void multiply(float (&r_sum)[4], const Factors<ptx::Tf32>& a, const Factors<ptx::Tf32>& b,
                        int half) {
  ptx::mma_m16n8k8_tf32(r_sum, a.r, b.r[2 * half], b.r[2 * half + 1]);
}

// The product of the small parts is below a float's last bit. The tensor cores truncate sums,
// always towards zero: of a long one that would be much, so they sum eight products alone.
FA_DEVICE void multiply(float (&r_sum)[4], const Factors<float>& a, const Factors<float>& b,
                        int half) {
  float r_products[4] = {};
  ptx::mma_m16n8k8_tf32(r_products, a.small, b.r[2 * half], b.r[2 * half + 1]);
  ptx::mma_m16n8k8_tf32(r_products, a.r, b.small[2 * half], b.small[2 * half + 1]);
  ptx::mma_m16n8k8_tf32(r_products, a.r, b.r[2 * half], b.r[2 * half + 1]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    r_sum[i] += r_products[i];
  }
}

}  // namespace fa::device
