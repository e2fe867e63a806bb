// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels for every processor of the architecture: SSE2 on x86-64, NEON on aarch64.
#include "cpu/install.h"

#define FA_CPU_ISA baseline
#define FA_CPU_VECTOR_BYTES 16
#define FA_CPU_GEMM_ROWS 6

#include "cpu/kernels.h"
