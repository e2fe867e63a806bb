// SPDX-License-Identifier: BSD-3-Clause
// All kernels of one instruction set. An isa_*.cpp file includes this once, between its target
// pragmas, after install.h: every header of the standard library is then already read.
#pragma once

#include "cpu/bwd.h"
#include "cpu/fwd.h"
#include "cpu/install.h"

namespace fa::cpu::FA_CPU_ISA {

void install(RegisteredKernel* kernels) {
  for_each_row<Family::kCpu, Pass::kForward, kMaxHeadDim>(
      [kernels]<int kRow>() { kernels[kRow].forward = flash_fwd<kRow>; });
  for_each_row<Family::kCpu, Pass::kBackward, kMaxHeadDim>(
      [kernels]<int kRow>() { kernels[kRow].backward = flash_bwd<kRow>; });
}

}  // namespace fa::cpu::FA_CPU_ISA
