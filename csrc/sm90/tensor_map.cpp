// SPDX-License-Identifier: BSD-3-Clause
#include "sm90/tensor_map.h"

#include <cuda_runtime_api.h>

#include "common/math.h"
#include "support/cuda_check.h"

namespace fa::sm90 {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, looked up so that nothing needs to link against the driver.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  constexpr unsigned kCudaVersion = 12000;
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kCudaVersion,
                                              cudaEnableDefault, &result),
             "find cuTensorMapEncodeTiled in the driver");
  check(result == cudaDriverEntryPointSuccess, ErrorKind::kRuntime,
        "the CUDA driver has no cuTensorMapEncodeTiled: update the driver");
  return reinterpret_cast<Encode>(function);
}

// The driver wants a context, which the runtime gives a thread with its first call that needs one:
// autograd's thread may have made none.
void enter_context() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "find the current device");
  check_cuda(cudaSetDevice(device), "enter the device's context");
}

}  // namespace

CUtensorMap make_tensor_map(const TensorMapRequest& request) {
  static const Encode encode = find_encode();
  constexpr int kRank = 4;
  constexpr cuuint64_t kElementBytes = 2;
  // Of an empty tensor no box is ever asked for, but sizes, strides and the address must be legal.
  const bool is_empty = request.rows <= 0;
  alignas(16) static char nothing[16];
  void* data = is_empty ? nothing : request.view.data;
  const int heads = is_empty ? 1 : request.heads;
  const int batch = is_empty ? 1 : request.batch;
  const auto extent = [](int size) { return static_cast<cuuint64_t>(max(size, 1)); };
  // The stride of a dimension of size 1 is never used, but must be legal.
  const auto bytes = [&](int64_t stride, int size) {
    return size > 1 ? kElementBytes * static_cast<cuuint64_t>(stride) : cuuint64_t{16};
  };
  const cuuint64_t sizes[kRank] = {extent(request.cols), extent(request.rows), extent(heads),
                                   extent(batch)};
  const cuuint64_t strides[kRank - 1] = {bytes(request.view.row_stride, request.rows),
                                         bytes(request.view.head_stride, heads),
                                         bytes(request.view.batch_stride, batch)};
  const cuuint32_t box[kRank] = {64, static_cast<cuuint32_t>(request.box_rows), 1, 1};
  const cuuint32_t element_strides[kRank] = {1, 1, 1, 1};
  CUtensorMap map;
  const auto describe = [&] {
    return encode(&map,
                  request.dtype == Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                    : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                  kRank, data, sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult status = describe();
  if (status == CUDA_ERROR_INVALID_CONTEXT) {
    enter_context();
    status = describe();
  }
  check(status == CUDA_SUCCESS, ErrorKind::kRuntime,
        "CUDA could not describe a tensor to TMA: error ", static_cast<int>(status));
  return map;
}

}  // namespace fa::sm90
