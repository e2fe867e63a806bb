// SPDX-License-Identifier: BSD-3-Clause
// What dropout keeps, written out. A block for each row of a head's pairs, for as many blocks as a
// grid may have.
#include "common/dropout_mask.h"
#include "device/convert.cuh"
#include "dispatch/registry.h"
#include "support/launch.cuh"

namespace fa::support {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    flash_dropout_mask(const __grid_constant__ DropoutMask mask) {
  for (int64_t row = blockIdx.x; row < mask.rows(); row += gridDim.x) {
    mask.fill_row(row, static_cast<int>(threadIdx.x), kThreads);
  }
}

void dropout_mask_on_cuda(const DropoutMask& mask, void* stream) {
  const auto blocks = static_cast<unsigned>(min(mask.rows(), kMaxBlocks));
  start<flash_dropout_mask, Begin::kAfterPrevious>("flash_dropout_mask", blocks, kThreads, 0,
                                                   stream, mask);
}

const bool g_registered = [] {
  registry().dropout_mask_on_cuda = dropout_mask_on_cuda;
  return true;
}();

}  // namespace
}  // namespace fa::support
