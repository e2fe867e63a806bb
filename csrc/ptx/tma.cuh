// SPDX-License-Identifier: BSD-3-Clause
// The tensor memory accelerator: boxes of up to four dimensions between global and shared memory,
// by one thread, as a tensor map (CUtensorMap, in constant memory) describes them. What lies
// outside the tensor is read as zero and not written. PTX ISA, "Data Movement and Conversion
// Instructions: cp.async.bulk.tensor".
#pragma once

#include "ptx/common.cuh"

namespace fa::ptx {

// Where a box begins: its first element in each dimension, the contiguous one first.
struct BoxOrigin {
  int col;
  int row;
  int head;
  int batch;
};

FA_DEVICE void prefetch_tensor_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Completes on an mbarrier that expects the bytes of the box.
FA_DEVICE void tma_load(void* s_box, const void* map, const BoxOrigin& origin,
                        uint64_t& s_barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(smem_address(s_box)),
      "l"(map), "r"(origin.col), "r"(origin.row), "r"(origin.head), "r"(origin.batch),
      "r"(smem_address(&s_barrier))
      : "memory");
}

// Consecutive bytes, a multiple of 16, without a tensor map.
// PTX ISA, "Data Movement and Conversion Instructions: cp.async.bulk".
FA_DEVICE void bulk_load(void* s_bytes, const void* g_bytes, int bytes, uint64_t& s_barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem_address(s_bytes)),
      "l"(g_bytes), "r"(bytes), "r"(smem_address(&s_barrier))
      : "memory");
}

FA_DEVICE void tma_store(const void* map, const BoxOrigin& origin, const void* s_box) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(
          map),
      "r"(origin.col), "r"(origin.row), "r"(origin.head), "r"(origin.batch),
      "r"(smem_address(s_box))
      : "memory");
}

// Closes a group of this thread's stores.
FA_DEVICE void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all of this thread's stores have read shared memory.
FA_DEVICE void tma_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Until all of this thread's stores are done.
FA_DEVICE void tma_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Shows what this thread has written to shared memory to wgmma and TMA.
// PTX ISA, "fence.proxy.async".
FA_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace fa::ptx
