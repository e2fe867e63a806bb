// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels for x86-64 with AVX2 and FMA.
#include "cpu/install.h"

#if defined(__x86_64__)

#define FA_CPU_ISA avx2
#define FA_CPU_VECTOR_BYTES 32
#define FA_CPU_GEMM_ROWS 6  // 12 sums, 2 vectors and a broadcast in 16 registers

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // defined(__x86_64__)
