// SPDX-License-Identifier: BSD-3-Clause
// Pairs of warps that meet at barriers of their own, each pair another number of times.
//
// This program is free of races, and yet compute-sanitizer's racecheck reports one (seen with CUDA
// 13.0, 3 hazards in each of three runs): where pairs have met different numbers of times, it takes
// accesses that __syncthreads separates for simultaneous. It does so in the forward kernels of
// head_dim above 128 too, whose pairs work like these.
#include <cstdio>

#include "ptx/barrier.cuh"
#include "tests/support/cuda_blocks.h"

namespace {

using namespace fa;
using namespace fa::test;

constexpr int kPairs = 4;
constexpr int kPairThreads = 2 * ptx::kWarpSize;
constexpr int kThreads = kPairs * kPairThreads;
constexpr int kRounds = 3;
constexpr int kBlocks = 8;  // which all do the same

// Pair i meets i + 1 times a round. Each time, a thread gives a number to its counterpart in the
// pair's other warp; and once a round, to its counterpart in the next pair.
__global__ void meetings_kernel(int* g_sums, int* g_agreed) {
  __shared__ int s_for_pair[kThreads];
  __shared__ int s_for_block[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int pair = thread / kPairThreads;
  const int barrier = 1 + pair;
  int sum = 0;
  int agreed = 0;
  for (int round = 0; round < kRounds; ++round) {
    for (int meeting = 0; meeting <= pair; ++meeting) {
      const bool one_thread_says_so = thread % kPairThreads == meeting;
      agreed += ptx::barrier_any<kPairThreads>(barrier, one_thread_says_so && round > 0);
      s_for_pair[thread] = thread * (meeting + 1);
      ptx::barrier_sync<kPairThreads>(barrier);
      sum += s_for_pair[thread ^ ptx::kWarpSize];
    }
    s_for_block[thread] = thread;
    __syncthreads();
    sum += s_for_block[(thread + kPairThreads) % kThreads];
    __syncthreads();
  }
  g_sums[thread] = sum;
  g_agreed[thread] = agreed;
}

void test_meetings() {
  Managed<int> sums(kThreads, -1);
  Managed<int> agreed(kThreads, -1);
  run<meetings_kernel>(kBlocks, kThreads, 0, sums.data, agreed.data);
  expect(
      "barrier_sync shows what the other warp wrote", 1, kThreads, 0,
      [&](int, int thread) { return sums[thread]; },
      [](int, int thread) {
        const int meetings = thread / kPairThreads + 1;
        return kRounds * ((thread ^ ptx::kWarpSize) * meetings * (meetings + 1) / 2 +
                          (thread + kPairThreads) % kThreads);
      });
  expect(
      "barrier_any tells what any thread said", 1, kThreads, 0,
      [&](int, int thread) { return agreed[thread]; },
      [](int, int thread) { return (kRounds - 1) * (thread / kPairThreads + 1); });
}

}  // namespace

int main() { return run_tests(test_meetings); }
