// SPDX-License-Identifier: BSD-3-Clause
// Vectors of one instruction set, in the compiler's portable vector extension.
//
// This header and all that kernels.h includes but install.h is compiled once per instruction set,
// between the target pragmas of an isa_*.cpp file. All they define lies in the namespace FA_CPU_ISA
// and they instantiate nothing of the standard library: the linker merges equal inline functions,
// and must never hand one that holds AVX instructions to code that runs everywhere.
// tests/rules/check_isa.py proves it of a build.
#pragma once

#include <cstdint>

#define FA_CPU_INLINE inline __attribute__((always_inline))

namespace fa::cpu::FA_CPU_ISA {

inline constexpr int kVectorBytes = FA_CPU_VECTOR_BYTES;

template <typename Real>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef float UnalignedVec __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  using Lane = int32_t;
  static constexpr int kLanes = kVectorBytes / 4;

  // exp: the powers of two that normal floats reach, and ln 2 in two parts, the first with so few
  // bits that its product with one of them is exact.
  static constexpr int kMantissaBits = 23;
  static constexpr int kBias = 127;
  static constexpr float kLog2E = 0x1.715476p+0f;
  static constexpr float kLn2High = 0x1.63p-1f;
  static constexpr float kLn2Low = -0x1.bd0106p-13f;
  static constexpr float kRounder = 0x1.8p+23f;
  static constexpr float kLowest = -88.0f;
  static constexpr float kHighest = 88.8f;
  static constexpr int kTerms = 8;
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef double UnalignedVec __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  using Lane = int64_t;
  static constexpr int kLanes = kVectorBytes / 8;

  static constexpr int kMantissaBits = 52;
  static constexpr int kBias = 1023;
  static constexpr double kLog2E = 0x1.71547652b82fep+0;
  static constexpr double kLn2High = 0x1.62e42feep-1;
  static constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kRounder = 0x1.8p+52;
  static constexpr double kLowest = -709.0;
  static constexpr double kHighest = 709.9;
  static constexpr int kTerms = 14;
};

template <typename Real>
using Vec = typename Simd<Real>::Vec;

template <typename Real>
inline constexpr int kLanes = Simd<Real>::kLanes;

template <typename Real>
inline constexpr Real kInfinity = static_cast<Real>(__builtin_inf());

template <typename Real>
FA_CPU_INLINE Vec<Real> load(const Real* source) {
  return *reinterpret_cast<const typename Simd<Real>::UnalignedVec*>(source);
}

template <typename Real>
FA_CPU_INLINE void store(Real* target, Vec<Real> value) {
  *reinterpret_cast<typename Simd<Real>::UnalignedVec*>(target) = value;
}

template <typename Real>
FA_CPU_INLINE Vec<Real> broadcast(Real value) {
  return value - Vec<Real>{};
}

template <typename Real>
FA_CPU_INLINE Real sum_of_lanes(Vec<Real> value) {
  Real sum = 0;
  for (int lane = 0; lane < kLanes<Real>; ++lane) {
    sum += value[lane];
  }
  return sum;
}

// 1 / n!, n = 0, 1, ...: the Taylor series of exp.
template <typename Real>
struct InverseFactorials {
  Real at[Simd<Real>::kTerms];
  constexpr InverseFactorials() : at{} {
    double factorial = 1;
    for (int n = 0; n < Simd<Real>::kTerms; ++n) {
      factorial *= n == 0 ? 1 : n;
      at[n] = static_cast<Real>(1 / factorial);
    }
  }
};

// The sum of x^(n - first) / n! from n = first on, for |x| up to ln 2 / 2: exp(x) for first = 0.
template <typename Real>
FA_CPU_INLINE Vec<Real> exp_series(Vec<Real> x, int first) {
  constexpr InverseFactorials<Real> kCoefficients;
  Vec<Real> series = broadcast<Real>(kCoefficients.at[Simd<Real>::kTerms - 1]);
#pragma GCC unroll 16
  for (int term = Simd<Real>::kTerms - 2; term >= first; --term) {
    series = series * x + kCoefficients.at[term];
  }
  return series;
}

// exp(x) = 2^n * exp(x - n ln 2) to 2 ulp; inf above the range, exactly 0 below it and for -inf
// (subnormal results count as below), NaN for NaN.
template <typename Real>
FA_CPU_INLINE Vec<Real> exp(Vec<Real> x) {
  using S = Simd<Real>;
  using Int = typename S::Int;
  // At the lowest x, n + bias is 0, and so are the bits of the "2^n" that multiplies the result.
  const Vec<Real> lowest = broadcast<Real>(S::kLowest);
  const Vec<Real> highest = broadcast<Real>(S::kHighest);
  x = lowest > x ? lowest : x;
  x = highest < x ? highest : x;

  const Vec<Real> rounded = x * S::kLog2E + S::kRounder;  // n in the last bits of the mantissa
  const Vec<Real> n = rounded - S::kRounder;
  Vec<Real> rest = x - n * S::kLn2High;
  rest = rest - n * S::kLn2Low;

  const Vec<Real> series = exp_series<Real>(rest, 0);
  const Int exponent = reinterpret_cast<Int>(rounded) + S::kBias;
  const Int bits = exponent << S::kMantissaBits;
  return series * reinterpret_cast<Vec<Real>>(bits);
}

// tanh(x) = e / (e + 2), e = exp(2 x) - 1, to a few ulp; NaN for NaN.
template <typename Real>
FA_CPU_INLINE Vec<Real> tanh(Vec<Real> x) {
  const Vec<Real> largest = broadcast<Real>(40);  // beyond it tanh is 1, and exp may be inf
  const Vec<Real> small = broadcast<Real>(Real{0.34});
  Vec<Real> twice = 2 * (x < Vec<Real>{} ? -x : x);
  twice = largest < twice ? largest : twice;
  const Vec<Real> e =
      twice < small ? twice * exp_series<Real>(twice, 1) : exp<Real>(twice) - Real{1};
  const Vec<Real> result = e / (e + Real{2});
  return x < Vec<Real>{} ? -result : result;
}

}  // namespace fa::cpu::FA_CPU_ISA
