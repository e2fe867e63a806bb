// SPDX-License-Identifier: BSD-3-Clause
#include "api/launch.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <atomic>

#include "common/check.h"

namespace fa::api {
namespace {

using GetCurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// aoti_torch_get_current_cuda_stream lives in libtorch_cuda. Linking it would tie the build to a
// CUDA torch, and a weak reference stays null where the linker drops the library, so it is looked
// up once in the library torch has loaded.
GetCurrentStream find_get_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  void* symbol =
      library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  check(symbol != nullptr, ErrorKind::kRuntime,
        "the running torch has no CUDA support, but was given CUDA tensors");
  return reinterpret_cast<GetCurrentStream>(symbol);
}

void* current_cuda_stream(int device_index) {
  static const GetCurrentStream get_current_stream = find_get_current_stream();
  void* stream = nullptr;
  check(get_current_stream(device_index, &stream) == TORCH_SUCCESS, ErrorKind::kRuntime,
        "torch did not name the current stream of cuda:", device_index);
  return stream;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                  void (*body)(int64_t, int64_t, void*), void* context) {
  // All that a CPU kernel throws is std::bad_alloc, for its scratch memory.
  check(torch_parallel_for(begin, end, grain_size, body, context) == TORCH_SUCCESS,
        ErrorKind::kOutOfMemory,
        "CPU out of memory. A kernel could not allocate its scratch memory");
}

template <typename Params>
void launch_row(void (*kernel)(const Params&, const LaunchContext&), const Params& params,
                const Argument& q) {
  if (q.device.is_cpu()) {
    kernel(params, {.parallel_for = parallel_for});
    return;
  }
  const int device_index = q.device.index();
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  kernel(params, {.stream = current_cuda_stream(device_index)});
}

std::atomic<int64_t> g_smem_limit = 0;

}  // namespace

CudaDevice cuda_device(int device_index) {
  check(registry().query_cuda_device != nullptr, ErrorKind::kNotImplemented,
        "this build of flash_attn_cuda has no CUDA kernels; reinstall it from source where nvcc "
        "(CUDA "
        "12.8 or newer) is on PATH or CUDA_HOME is set");
  CudaDevice device = registry().query_cuda_device(device_index);
  if (const int64_t limit = g_smem_limit; limit != 0) {
    device.smem_opt_in = std::min(device.smem_opt_in, limit);
  }
  return device;
}

void limit_shared_memory(int64_t bytes) { g_smem_limit = bytes; }

Problem problem_for(Pass pass, const Argument& q, const Shape& shape, const WindowMask& window,
                    const ScoreRules& rules, bool allow_tf32) {
  const Dtype dtype = dtype_of(q);
  const bool as_tf32 = allow_tf32 && dtype == Dtype::kFloat32 && q.device.is_cuda();
  return {.pass = pass,
          .dtype = as_tf32 ? Dtype::kTf32 : dtype,
          .head_dim = std::max(shape.head_dim, shape.head_dim_v),
          .full_mask = window.is_full(),
          .general_scores = rules.any(),
          .softcap = rules.terms.softcap != 0,
          .on_cuda = q.device.is_cuda(),
          .device = q.device.is_cuda() ? cuda_device(q.device.index()) : CudaDevice{}};
}

void clean_on_cuda(const GivenSequences& queries, const GivenSequences& keys, const Argument& q) {
  cuda_device(q.device.index());  // or throws, where there are no CUDA kernels
  const torch::stable::accelerator::DeviceGuard guard(q.device.index());
  registry().clean_sequences_on_cuda(&queries, &keys, current_cuda_stream(q.device.index()));
}

void fill_on_cuda(std::initializer_list<LeftRows> results, const Argument& q) {
  const torch::stable::accelerator::DeviceGuard guard(q.device.index());
  registry().fill_left_rows_on_cuda(results.begin(), static_cast<int>(results.size()),
                                    current_cuda_stream(q.device.index()));
}

void fill_dropout_mask(const DropoutMask& mask, const Argument& rng_state) {
  if (rng_state.device.is_cuda()) {
    const int device_index = rng_state.device.index();
    cuda_device(device_index);  // or throws, where there are no CUDA kernels
    const torch::stable::accelerator::DeviceGuard guard(device_index);
    registry().dropout_mask_on_cuda(mask, current_cuda_stream(device_index));
    return;
  }
  const auto fill_rows = [](int64_t begin, int64_t end, void* context) {
    const auto& mask = *static_cast<const DropoutMask*>(context);
    for (int64_t row = begin; row < end; ++row) {
      mask.fill_row(row);
    }
  };
  parallel_for(0, mask.rows(), 1, fill_rows, const_cast<DropoutMask*>(&mask));
}

void launch(const FwdParams& params, const Argument& q, int row) {
  launch_row(registry().kernels[row].forward, params, q);
}

void launch(const BwdParams& params, const Argument& q, int row) {
  launch_row(registry().kernels[row].backward, params, q);
}

}  // namespace fa::api
