// SPDX-License-Identifier: BSD-3-Clause
// Element types of tensors and their conversion to and from the precision that kernels compute in.
// Integer arithmetic only, so that every instruction set rounds alike: to nearest, ties to even.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/simd.h"

namespace fa::cpu::FA_CPU_ISA {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// What a tensor of a dtype stores, and the precision of its softmax and sums.
template <Dtype kDtype>
struct ElementOf;
template <>
struct ElementOf<Dtype::kFloat64> {
  using Element = double;
  using Real = double;
};
template <>
struct ElementOf<Dtype::kFloat32> {
  using Element = float;
  using Real = float;
};
template <>
struct ElementOf<Dtype::kFloat16> {
  using Element = Float16;
  using Real = float;
};
template <>
struct ElementOf<Dtype::kBFloat16> {
  using Element = BFloat16;
  using Real = float;
};

typedef int32_t Int32s __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Uint32s __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Uint16s __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t UnalignedUint16s
    __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

FA_CPU_INLINE Vec<float> as_floats(Int32s bits) { return reinterpret_cast<Vec<float>>(bits); }
FA_CPU_INLINE Int32s as_bits(Vec<float> value) { return reinterpret_cast<Int32s>(value); }

FA_CPU_INLINE Int32s load_16_bits(const void* source) {
  const Uint16s halves = *static_cast<const UnalignedUint16s*>(source);
  return __builtin_convertvector(halves, Int32s);
}

FA_CPU_INLINE void store_16_bits(void* target, Int32s value) {
  *static_cast<UnalignedUint16s*>(target) = __builtin_convertvector(value, Uint16s);
}

FA_CPU_INLINE Vec<float> load_elements(const float* source) { return load(source); }
FA_CPU_INLINE Vec<double> load_elements(const double* source) { return load(source); }

FA_CPU_INLINE Vec<float> load_elements(const BFloat16* source) {
  return as_floats(load_16_bits(source) << 16);
}

FA_CPU_INLINE Vec<float> load_elements(const Float16* source) {
  const Int32s bits = load_16_bits(source);
  const Int32s magnitude = (bits & 0x7fff) << 13;  // exponent and mantissa at their places
  const Vec<float> rebiased = as_floats(magnitude) * 0x1p+112f;  // subnormals come out right too
  const Int32s special = magnitude >= 0x7c00 << 13 ? magnitude | 0x7f800000 : as_bits(rebiased);
  return as_floats(special | ((bits & 0x8000) << 16));
}

FA_CPU_INLINE void store_elements(float* target, Vec<float> value) { store(target, value); }
FA_CPU_INLINE void store_elements(double* target, Vec<double> value) { store(target, value); }

FA_CPU_INLINE void store_elements(BFloat16* target, Vec<float> value) {
  const Int32s bits = as_bits(value);
  const Int32s magnitude = bits & 0x7fffffff;
  const Int32s rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Int32s kept = magnitude > 0x7f800000 ? bits | 0x400000 : rounded;  // a NaN stays one
  store_16_bits(target, (kept >> 16) & 0xffff);
}

FA_CPU_INLINE void store_elements(Float16* target, Vec<float> value) {
  const Int32s bits = as_bits(value);
  const Int32s magnitude = bits & 0x7fffffff;
  const Int32s sign = (bits >> 16) & 0x8000;
  const Int32s normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // A sum with 1/2 leaves a subnormal half, rounded, in the last bits of the mantissa.
  const Int32s subnormal = as_bits(as_floats(magnitude) + 0.5f) - (126 << 23);
  const Int32s none = Int32s{};
  const Int32s special = magnitude > 0x7f800000 ? none + 0x7e00 : none + 0x7c00;
  Int32s half = magnitude < (113 << 23) ? subnormal : normal;
  half = magnitude >= (143 << 23) ? special : half;
  store_16_bits(target, half | sign);
}

}  // namespace fa::cpu::FA_CPU_ISA
