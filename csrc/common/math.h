// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "common/types.h"

namespace fa {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

template <typename Int>
FA_HOST_DEVICE constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

template <typename Int>
FA_HOST_DEVICE constexpr Int round_up(Int a, Int b) {
  return ceil_div(a, b) * b;
}

template <typename Number>
FA_HOST_DEVICE constexpr Number min(Number a, Number b) {
  return a < b ? a : b;
}

template <typename Number>
FA_HOST_DEVICE constexpr Number max(Number a, Number b) {
  return a < b ? b : a;
}

}  // namespace fa
