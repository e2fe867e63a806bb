// SPDX-License-Identifier: BSD-3-Clause
// Which rows of the kernel table this build contains. A kernel's source file registers its rows
// when the library is loaded; a file left out of the build leaves its rows absent, and selection
// says so by name.
#pragma once

#include <array>
#include <cstdint>

#include "common/clean_sequences.h"
#include "common/dropout_mask.h"
#include "common/left_rows.h"
#include "common/params.h"
#include "dispatch/kernel_table.h"

namespace fa {

// Runs body(begin, end, context) over chunks of [begin, end) on the caller's threads.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain_size,
                             void (*body)(int64_t begin, int64_t end, void* context),
                             void* context);

// Where a kernel runs: a CUDA stream of the current device, or the CPU's threads.
struct LaunchContext {
  void* stream = nullptr;
  ParallelFor parallel_for = nullptr;
};

// Registers, shared memory and spills of a compiled CUDA kernel, as the driver reports them.
struct KernelResources {
  int registers;
  int64_t local_bytes;  // per thread; more than 0 means spills or stack
  int64_t static_smem_bytes;
  int64_t dynamic_smem_bytes;
};

struct RegisteredKernel {
  void (*forward)(const FwdParams&, const LaunchContext&) = nullptr;   // of a kForward row
  void (*backward)(const BwdParams&, const LaunchContext&) = nullptr;  // of a kBackward row
  KernelResources (*resources)() = nullptr;                            // of a CUDA row
  bool hidden = false;  // by a test, for which another row is to run

  bool present() const { return !hidden && (forward != nullptr || backward != nullptr); }
};

// What selection must know of a CUDA device.
struct CudaDevice {
  int compute_capability;  // 90 for sm_90
  int64_t smem_opt_in;     // largest dynamic shared memory of a block, in bytes
};

struct Registry {
  std::array<RegisteredKernel, kNumRows> kernels;

  // Set by the CUDA support code; null in a build without CUDA. Throws fa::Error where the driver
  // is missing or older than the toolkit of the build.
  CudaDevice (*query_cuda_device)(int device_index) = nullptr;
  // common/clean_sequences.h on a stream of the current device; either may be null. Set like it.
  void (*clean_sequences_on_cuda)(const GivenSequences* queries, const GivenSequences* keys,
                                  void* stream) = nullptr;
  // common/left_rows.h, of up to kMostResults of one batch. Set like it.
  static constexpr int kMostResults = 3;
  void (*fill_left_rows_on_cuda)(const LeftRows* results, int count, void* stream) = nullptr;
  // Fills in a mask on a stream of the current device. Set like it.
  void (*dropout_mask_on_cuda)(const DropoutMask& mask, void* stream) = nullptr;
  int cuda_version = 0;  // of the toolkit, as CUDART_VERSION; 0 in a build without CUDA

  // The vector instructions that the CPU kernels chose on this machine, for example "avx2".
  const char* cpu_isa = "none";
};

// The one instance, safe to use while libraries are still being loaded.
Registry& registry();

}  // namespace fa
