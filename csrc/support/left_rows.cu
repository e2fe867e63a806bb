// SPDX-License-Identifier: BSD-3-Clause
// common/left_rows.h on a GPU: some blocks for each gap of each result. Mostly there is nothing to
// fill, which the host cannot know.
#include "common/left_rows.h"

#include "dispatch/registry.h"
#include "support/launch.cuh"

namespace fa::support {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksOfMultiprocessor = 4;

struct Results {
  LeftRows results[Registry::kMostResults];
};

__global__ void __launch_bounds__(kThreads)
    flash_fill_left_rows(const __grid_constant__ Results all) {
  const LeftRows& result = all.results[blockIdx.z];
  const int gap = static_cast<int>(blockIdx.x);
  if (gap > result.batch) {
    return;
  }
  const Range rows = rows_left(result.sequences, gap, result.batch, result.rows);
  const int64_t begin = rows.begin * result.words_of_row;
  const int64_t end = rows.end * result.words_of_row;
  const int64_t step = int64_t{gridDim.y} * kThreads;
  for (int plane = 0; plane < result.planes && begin < end; ++plane) {
    uint32_t* g_words = result.words + result.first_word(gap, plane);
    for (int64_t word = begin + blockIdx.y * kThreads + threadIdx.x; word < end; word += step) {
      g_words[word] = result.value;
    }
  }
}

void fill_left_rows_on_cuda(const LeftRows* results, int count, void* stream) {
  Results all = {};
  int gaps = 0;
  for (int i = 0; i < count; ++i) {
    all.results[i] = results[i];
    gaps = max(gaps, results[i].batch + 1);
  }
  const int blocks_of_gap = max(multiprocessors() * kBlocksOfMultiprocessor / gaps, 1);
  const dim3 grid(gaps, blocks_of_gap, count);
  flash_fill_left_rows<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(all);
  check_cuda(cudaGetLastError(), "launch flash_fill_left_rows");
}

const bool g_registered = [] {
  registry().fill_left_rows_on_cuda = fill_left_rows_on_cuda;
  return true;
}();

}  // namespace
}  // namespace fa::support
