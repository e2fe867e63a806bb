// SPDX-License-Identifier: BSD-3-Clause
// Barriers among some warps of a block, of which barrier 0 is __syncthreads(); and the one between
// kernels of a stream.
#pragma once

#include "ptx/common.cuh"

namespace fa::ptx {

// PTX ISA, "Parallel Synchronization and Communication Instructions: barrier", .sync.
template <int kThreads>
FA_DEVICE void barrier_sync(int id) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// Counts towards a barrier that other warps wait at: kThreads are those that wait and those that
// arrive.
// PTX ISA, "Parallel Synchronization and Communication Instructions: barrier", .arrive.
template <int kThreads>
FA_DEVICE void barrier_arrive(int id) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// Whether the predicate holds in any thread of those that meet.
// PTX ISA, "Parallel Synchronization and Communication Instructions: barrier", .red.or.pred.
template <int kThreads>
FA_DEVICE bool barrier_any(int id, bool predicate) {
  int result;
  asm volatile(
      "{\n"
      "  .reg .pred p, q;\n"
      "  setp.ne.s32 p, %1, 0;\n"
      "  barrier.cta.red.or.pred.aligned q, %2, %3, p;\n"
      "  selp.s32 %0, 1, 0, q;\n"
      "}"
      : "=r"(result)
      : "r"(static_cast<int>(predicate)), "r"(id), "n"(kThreads)
      : "memory");
  return result != 0;
}

// Until the kernel before in the stream has ended and its writes are visible, where this one was
// launched to begin beside it.
// PTX ISA, "Parallel Synchronization and Communication Instructions: griddepcontrol", .wait.
FA_DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace fa::ptx
