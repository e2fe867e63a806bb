// SPDX-License-Identifier: BSD-3-Clause
// What each instruction set offers to isa.cpp: install() writes its kernels into the CPU rows of a
// table of kNumRows. It holds that set's instructions itself: call it only where they exist.
//
// This header reads, for code of every machine, all the headers that the kernels need; see simd.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <new>

#include "common/math.h"
#include "common/params.h"
#include "common/philox.h"
#include "common/scheduler.h"
#include "common/score_rules.h"
#include "common/score_terms.h"
#include "common/tile_map.h"
#include "common/types.h"
#include "common/window.h"
#include "dispatch/registry.h"

namespace fa::cpu {

inline constexpr int kMaxHeadDim = 512;  // of the CPU rows of the kernel table

namespace baseline {
void install(RegisteredKernel* kernels);
}
#if defined(__x86_64__)
namespace avx2 {
void install(RegisteredKernel* kernels);
}
namespace avx512 {
void install(RegisteredKernel* kernels);
}
#endif

}  // namespace fa::cpu
