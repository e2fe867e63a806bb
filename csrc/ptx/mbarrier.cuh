// SPDX-License-Identifier: BSD-3-Clause
// mbarriers: barriers in shared memory that also count the bytes of asynchronous copies. A phase
// completes when all expected arrivals have come and all expected bytes; phases alternate in
// parity, and a wait names the parity of the phase that it waits for.
// PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".
#pragma once

#include "ptx/common.cuh"

namespace fa::ptx {

// By one thread, before fence_mbarrier_init and a barrier of all threads.
FA_DEVICE void mbarrier_init(uint64_t& s_barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(&s_barrier)),
               "r"(arrivals)
               : "memory");
}

// Shows initialised mbarriers to asynchronous copies.
FA_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

FA_DEVICE void mbarrier_arrive(uint64_t& s_barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(&s_barrier))
               : "memory");
}

// Arrives and announces copies of so many bytes.
FA_DEVICE void mbarrier_arrive_expecting(uint64_t& s_barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(&s_barrier)),
      "r"(bytes)
      : "memory");
}

FA_DEVICE bool mbarrier_try_wait(uint64_t& s_barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      "  .reg .pred p;\n"
      "  mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "  selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(smem_address(&s_barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

FA_DEVICE void mbarrier_wait(uint64_t& s_barrier, uint32_t parity) {
  while (!mbarrier_try_wait(s_barrier, parity)) {
  }
}

// Both are tried before either is waited for, which hides the time that the second takes to answer.
FA_DEVICE void mbarrier_wait_both(uint64_t& s_first, uint32_t first_parity, uint64_t& s_second,
                                  uint32_t second_parity) {
  const bool first_done = mbarrier_try_wait(s_first, first_parity);
  const bool second_done = mbarrier_try_wait(s_second, second_parity);
  if (!first_done) {
    mbarrier_wait(s_first, first_parity);
  }
  if (!second_done) {
    mbarrier_wait(s_second, second_parity);
  }
}

}  // namespace fa::ptx
