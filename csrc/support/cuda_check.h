// SPDX-License-Identifier: BSD-3-Clause
// CUDA runtime errors as fa::Error.
#pragma once

#include <cuda_runtime_api.h>

#include "common/check.h"

namespace fa {

// `action` completes the sentence "CUDA could not ...".
template <typename... Parts>
void check_cuda(cudaError_t status, const Parts&... action) {
  if (status != cudaSuccess) [[unlikely]] {
    throw Error(ErrorKind::kRuntime,
                concat("CUDA could not ", action..., ": ", cudaGetErrorString(status), " (",
                       cudaGetErrorName(status), ")"));
  }
}

}  // namespace fa
