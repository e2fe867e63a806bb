// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels for x86-64 with AVX-512 (F, BW, DQ and VL).
#include "cpu/install.h"

#if defined(__x86_64__)

#define FA_CPU_ISA avx512
#define FA_CPU_VECTOR_BYTES 64
#define FA_CPU_GEMM_ROWS 8  // 16 sums: twice what the latency of two FMA units needs

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // defined(__x86_64__)
