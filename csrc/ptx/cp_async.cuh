// SPDX-License-Identifier: BSD-3-Clause
// Asynchronous copies from global to shared memory (compute capability 8.0).
#pragma once

#include "ptx/common.cuh"

namespace fa::ptx {

inline constexpr int kCpAsyncBytes = 16;

// Copies 16 bytes past L1, or writes 16 zero bytes and reads nothing where !read.
// PTX ISA, "Data Movement and Conversion Instructions: cp.async".
FA_DEVICE void cp_async_16(void* s_destination, const void* g_source, bool read = true) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem_address(s_destination)),
      "l"(g_source), "r"(read ? kCpAsyncBytes : 0)
      : "memory");
}

// Waits for all copies that this thread began; a barrier then shows them to the other threads.
// PTX ISA, "Data Movement and Conversion Instructions: cp.async.wait_all".
FA_DEVICE void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace fa::ptx
