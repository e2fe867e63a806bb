// SPDX-License-Identifier: BSD-3-Clause
// What the compiler made of a kernel, for introspection and tests.
#pragma once

#include "common/math.h"
#include "dispatch/registry.h"
#include "support/cuda_check.h"

namespace fa::support {

template <typename... Arguments>
KernelResources resources_of(void (*kernel)(Arguments...), int64_t dynamic_smem_bytes) {
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)),
             "describe a kernel");
  return {.registers = attributes.numRegs,
          .local_bytes = static_cast<int64_t>(attributes.localSizeBytes),
          .static_smem_bytes = static_cast<int64_t>(attributes.sharedSizeBytes),
          .dynamic_smem_bytes = dynamic_smem_bytes};
}

// The larger of each, for a pass of several kernels.
constexpr KernelResources larger(const KernelResources& a, const KernelResources& b) {
  return {.registers = max(a.registers, b.registers),
          .local_bytes = max(a.local_bytes, b.local_bytes),
          .static_smem_bytes = max(a.static_smem_bytes, b.static_smem_bytes),
          .dynamic_smem_bytes = max(a.dynamic_smem_bytes, b.dynamic_smem_bytes)};
}

}  // namespace fa::support
