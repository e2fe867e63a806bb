// SPDX-License-Identifier: BSD-3-Clause
// common/clean_sequences.h on a GPU: a block for the queries and one for the keys. Where a sequence
// begins is the largest of the first rows so far.
#include "common/clean_sequences.h"

#include "device/smem.cuh"
#include "dispatch/registry.h"
#include "support/cuda_check.h"

namespace fa::support {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / ptx::kWarpSize;
static_assert(kWarps == ptx::kWarpSize, "a warp has a lane for the largest of each warp");

struct GivenSides {
  GivenSequences sides[2];
};

// Of the values of this lane and of those before it.
FA_DEVICE int largest_so_far(int value) {
#pragma unroll
  for (int distance = 1; distance < ptx::kWarpSize; distance *= 2) {
    const int before = __shfl_up_sync(~0u, value, distance);
    value = ptx::lane_index() < distance ? value : max(value, before);
  }
  return value;
}

__global__ void __launch_bounds__(kThreads)
    flash_clean_sequences(const __grid_constant__ GivenSides given) {
  const GivenSequences& side = given.sides[blockIdx.x];
  auto& s_largest = device::shared_memory<int[kWarps]>();  // of each warp and those before it
  const int thread = static_cast<int>(threadIdx.x);
  if (side.cu_seqlens != nullptr) {
    int largest = 0;
    for (int first = 0; first <= side.batch; first += kThreads) {
      const int index = first + thread;
      const int value = largest_so_far(index <= side.batch ? side.clean_first_row(index) : 0);
      if (ptx::lane_index() == ptx::kWarpSize - 1) {
        s_largest[ptx::warp_index()] = value;
      }
      __syncthreads();
      if (ptx::warp_index() == 0) {
        s_largest[thread] = largest_so_far(s_largest[thread]);
      }
      __syncthreads();
      const int before = ptx::warp_index() == 0 ? 0 : s_largest[ptx::warp_index() - 1];
      if (index <= side.batch) {
        side.clean_cu_seqlens[index] = max(largest, max(before, value));
      }
      largest = max(largest, s_largest[kWarps - 1]);
      __syncthreads();
    }
  }
  for (int index = thread; index < side.batch; index += kThreads) {
    const int length = side.cu_seqlens == nullptr
                           ? side.rows
                           : side.clean_cu_seqlens[index + 1] - side.clean_cu_seqlens[index];
    side.clean_seqused[index] = side.clean_length(index, length);
  }
}

void clean_sequences_on_cuda(const GivenSequences* queries, const GivenSequences* keys,
                             void* stream) {
  GivenSides given = {};
  int count = 0;
  for (const GivenSequences* side : {queries, keys}) {
    if (side != nullptr) {
      given.sides[count++] = *side;
    }
  }
  if (count == 0) {
    return;
  }
  flash_clean_sequences<<<count, kThreads, sizeof(int[kWarps]),
                          static_cast<cudaStream_t>(stream)>>>(given);
  check_cuda(cudaGetLastError(), "launch flash_clean_sequences");
}

const bool g_registered = [] {
  registry().clean_sequences_on_cuda = clean_sequences_on_cuda;
  return true;
}();

}  // namespace
}  // namespace fa::support
