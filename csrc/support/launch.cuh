// SPDX-License-Identifier: BSD-3-Clause
// How every kernel of this library is launched: over work items, on the caller's stream, with the
// errors checked.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "common/math.h"
#include "common/scheduler.h"
#include "common/seqlen.h"
#include "support/cuda_check.h"

namespace fa::support {

// Blocks of one launch, one for each work item. Far more than run at a time, and few enough that
// further launches are testable.
inline constexpr int64_t kMaxBlocks = int64_t{1} << 20;

// Dynamic shared memory that needs no opt-in.
inline constexpr size_t kDefaultSmemBytes = 48 * 1024;

// Lets a kernel use its shared memory, once per device. Two threads may both do it: it is
// idempotent.
template <auto kKernel>
void opt_in_to_smem(size_t smem_bytes) {
  if (smem_bytes <= kDefaultSmemBytes) {
    return;
  }
  static std::atomic<uint64_t> done{0};  // one bit per device; devices from 64 on are never marked
  int device = 0;
  check_cuda(cudaGetDevice(&device), "tell the current device");
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (done.load(std::memory_order_acquire) & bit) {
    return;
  }
  check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(smem_bytes)),
             "give a kernel ", smem_bytes, " bytes of shared memory");
  done.fetch_or(bit, std::memory_order_release);
}

// Whether a kernel begins when the one before it in the stream has ended, or already while its last
// blocks end. The latter must call ptx::wait_for_previous_kernel() before it reads or writes global
// memory.
enum class Begin { kAfterPrevious, kBesidePrevious };

template <auto kKernel, Begin kBegin, typename... Arguments>
void start(const char* name, unsigned blocks, int threads, size_t smem_bytes, void* stream,
           const Arguments&... arguments) {
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = kBegin == Begin::kBesidePrevious ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kKernel, arguments...), "launch ", name);
}

// Of all tiles of a batch's sequences; packed ones are numbered through the batch
// (device::in_sequence()), so that no kernel need know the longest.
inline TileScheduler schedule(const Sequences& sequences, int batch, int seqlen, int tile_rows,
                              int heads) {
  if (sequences.cu_seqlens == nullptr || batch == 0) {
    return {ceil_div(seqlen, tile_rows), heads, batch};
  }
  const int64_t tiles = sequences.count_tiles(batch, sequences.packed_rows, seqlen, tile_rows);
  return {static_cast<int>(tiles), heads, 1};
}

// kKernel(params, scheduler) with a block for each work item.
template <auto kKernel, Begin kBegin = Begin::kAfterPrevious, typename Params>
void launch(const char* name, const Params& params, TileScheduler scheduler, int threads,
            size_t smem_bytes, void* stream) {
  opt_in_to_smem<kKernel>(smem_bytes);
  for (; scheduler.first < scheduler.count(); scheduler.first += kMaxBlocks) {
    const auto blocks = static_cast<unsigned>(min(scheduler.count() - scheduler.first, kMaxBlocks));
    start<kKernel, kBegin>(name, blocks, threads, smem_bytes, stream, params, scheduler);
  }
}

// How many multiprocessors the current device has.
inline int multiprocessors() {
  static std::atomic<int> known[64];  // by device; devices from 64 on are asked each time
  int device = 0;
  check_cuda(cudaGetDevice(&device), "tell the current device");
  if (device < 64 && known[device] != 0) {
    return known[device];
  }
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "count the multiprocessors of device ", device);
  if (device < 64) {
    known[device] = count;
  }
  return count;
}

// kKernel(arguments...) with a block for each multiprocessor, or for each work item where these are
// fewer.
template <auto kKernel, Begin kBegin = Begin::kAfterPrevious, typename... Arguments>
void launch_persistent(const char* name, int64_t work_items, int threads, size_t smem_bytes,
                       void* stream, const Arguments&... arguments) {
  if (work_items == 0) {
    return;
  }
  opt_in_to_smem<kKernel>(smem_bytes);
  const auto blocks = static_cast<unsigned>(min(work_items, int64_t{multiprocessors()}));
  start<kKernel, kBegin>(name, blocks, threads, smem_bytes, stream, arguments...);
}

}  // namespace fa::support
