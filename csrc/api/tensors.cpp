// SPDX-License-Identifier: BSD-3-Clause
#include "api/tensors.h"

#include <limits>
#include <string>

#include "common/check.h"

namespace fa::api {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kCudaAlignment = 16;  // bytes: one cp.async
constexpr int64_t kCudaHeadDimMultiple = 8;

std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(tensor.size(i));
  }
  return text + ")";
}

std::string device_text(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : concat("cuda:", tensor.get_device_index());
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && (a.is_cpu() || a.get_device_index() == b.get_device_index());
}

void check_device(const Argument& argument, const Argument& reference) {
  check(same_device(argument.tensor, reference.tensor), ErrorKind::kValue, argument.name,
        ": expected device ", device_text(reference.tensor), " like ", reference.name, ", got ",
        device_text(argument.tensor));
}

void check_same_kind(const Argument& argument, const Argument& reference) {
  const Dtype expected = dtype_of(reference);
  const Dtype dtype = dtype_of(argument);
  check(dtype == expected, ErrorKind::kType, argument.name, ": expected ", name_of(expected),
        " like ", reference.name, ", got ", name_of(dtype));
  check_device(argument, reference);
}

void check_size(const Argument& argument, int64_t dim, const char* dim_name, int64_t expected) {
  check(argument.tensor.size(dim) == expected, ErrorKind::kValue, argument.name, ": expected ",
        dim_name, " ", expected, ", got ", argument.tensor.size(dim), " in shape ",
        shape_text(argument.tensor));
}

int check_extent(const Argument& argument, int64_t dim, const char* dim_name, int64_t limit) {
  const int64_t size = argument.tensor.size(dim);
  check(size <= limit, ErrorKind::kValue, argument.name, ": expected ", dim_name, " at most ",
        limit, ", got ", size);
  return static_cast<int>(size);
}

void check_shape(const Argument& argument, std::initializer_list<int64_t> expected) {
  bool equal = argument.tensor.dim() == static_cast<int64_t>(expected.size());
  std::string expected_text;
  int64_t dim = 0;
  for (int64_t size : expected) {
    equal = equal && argument.tensor.size(dim) == size;
    expected_text += (dim == 0 ? "" : ", ") + std::to_string(size);
    ++dim;
  }
  check(equal, ErrorKind::kValue, argument.name, ": expected shape (", expected_text, "), got ",
        shape_text(argument.tensor));
}

// Runs what makes a tensor on the device of `like`. torch's stable ABI tells that it failed, not
// why; of a plain allocation or copy, the reason is lack of memory.
template <typename Make>
Tensor allocate(const Tensor& like, int64_t elements, Make&& make) {
  try {
    return make();
  } catch (const std::exception&) {
    throw Error(ErrorKind::kOutOfMemory, concat(like.is_cpu() ? "CPU" : "CUDA",
                                                " out of memory. torch could not make a tensor of ",
                                                elements, " elements on ", device_text(like)));
  }
}

bool aligned_for_cuda(const Tensor& tensor) {
  const int64_t bytes = static_cast<int64_t>(tensor.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kCudaAlignment == 0;
  for (int64_t dim = 0; dim < 3; ++dim) {
    aligned =
        aligned && (tensor.size(dim) <= 1 || tensor.stride(dim) * bytes % kCudaAlignment == 0);
  }
  return aligned;
}

}  // namespace

Dtype dtype_of(const Argument& argument) {
  switch (argument.tensor.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      throw Error(ErrorKind::kType,
                  concat(argument.name, ": expected bfloat16, float16, float32 or float64, got ",
                         torch::headeronly::toString(argument.tensor.scalar_type())));
  }
}

ScalarType statistics_dtype(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

Shape check_qkv(const Tensor& q, const Tensor& k, const Tensor& v) {
  const Argument q_argument{"q", q};
  const Argument k_argument{"k", k};
  const Argument v_argument{"v", v};
  for (const Argument& argument : {q_argument, k_argument, v_argument}) {
    check(argument.tensor.dim() == 4, ErrorKind::kValue, argument.name,
          ": expected 4 dimensions (batch, seqlen, heads, head_dim), got ", argument.tensor.dim(),
          " in shape ", shape_text(argument.tensor));
  }
  check_same_kind(k_argument, q_argument);
  check_same_kind(v_argument, q_argument);

  const int64_t int_limit = std::numeric_limits<int>::max();
  const Shape shape{.batch = check_extent(q_argument, 0, "batch", int_limit),
                    .num_heads = check_extent(q_argument, 2, "heads", int_limit),
                    .num_heads_kv = check_extent(k_argument, 2, "heads", int_limit),
                    .seqlen_q = check_extent(q_argument, 1, "seqlen", kMaxSeqlen),
                    .seqlen_k = check_extent(k_argument, 1, "seqlen", kMaxSeqlen),
                    .head_dim = check_extent(q_argument, 3, "head_dim", int_limit)};
  check(shape.head_dim >= 1, ErrorKind::kValue, "q: expected head_dim of at least 1, got 0");
  check_size(k_argument, 0, "batch", shape.batch);
  check_size(k_argument, 3, "head_dim", shape.head_dim);
  check_size(v_argument, 0, "batch", shape.batch);
  check_size(v_argument, 1, "seqlen", shape.seqlen_k);
  check_size(v_argument, 2, "heads", shape.num_heads_kv);
  check_size(v_argument, 3, "head_dim", shape.head_dim);
  const bool divides =
      shape.num_heads_kv == 0 ? shape.num_heads == 0 : shape.num_heads % shape.num_heads_kv == 0;
  check(divides, ErrorKind::kValue, "k, v: expected a number of heads that divides the ",
        shape.num_heads, " heads of q, got ", shape.num_heads_kv);
  return shape;
}

void check_row_statistics(const Argument& argument, const Shape& shape, const Tensor& q) {
  check_shape(argument, {shape.batch, shape.num_heads, shape.seqlen_q});
  const Dtype expected = dtype_of({"q", q}) == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const Dtype dtype = dtype_of(argument);
  check(dtype == expected, ErrorKind::kType, argument.name, ": expected ", name_of(expected),
        " for these q, k, v, got ", name_of(dtype));
  check_device(argument, {"q", q});
}

void check_like(const Argument& argument, const Argument& reference) {
  const Tensor& like = reference.tensor;
  check_shape(argument, {like.size(0), like.size(1), like.size(2), like.size(3)});
  check_same_kind(argument, reference);
}

WindowMask check_window(const Shape& shape, int64_t window_left, int64_t window_right) {
  for (int64_t bound : {window_left, window_right}) {
    check(bound >= -1, ErrorKind::kValue,
          "window_size: expected -1 (unbounded) or a number of keys on each side, got (",
          window_left, ", ", window_right, ")");
  }
  return {shape.seqlen_q, shape.seqlen_k, window_left, window_right};
}

int kernel_head_dim(const Tensor& tensor, int head_dim) {
  return tensor.is_cpu() ? head_dim : round_up(head_dim, static_cast<int>(kCudaHeadDimMultiple));
}

Tensor readable(const Tensor& tensor) {
  const int64_t head_dim = tensor.size(3);
  const int64_t padding = kernel_head_dim(tensor, static_cast<int>(head_dim)) - head_dim;
  const bool contiguous_head_dim = tensor.stride(3) == 1 || head_dim == 1;
  if (padding == 0 && contiguous_head_dim && (tensor.is_cpu() || aligned_for_cuda(tensor))) {
    return tensor;
  }
  return allocate(tensor, tensor.numel(), [&] {
    if (padding > 0) {
      const int64_t last_dim_padding[] = {0, padding};
      return torch::stable::contiguous(torch::stable::pad(tensor, {last_dim_padding, 2}));
    }
    // contiguous() returns the tensor itself where only its base is misaligned; clone() never does.
    return torch::stable::clone(torch::stable::contiguous(tensor));
  });
}

Tensor make_contiguous(const Tensor& tensor) {
  return allocate(tensor, tensor.numel(), [&] { return torch::stable::contiguous(tensor); });
}

Tensor empty(std::initializer_list<int64_t> sizes, const Tensor& like, ScalarType dtype) {
  int64_t elements = 1;
  for (int64_t size : sizes) {
    elements *= size;
  }
  return allocate(like, elements, [&] {
    return torch::stable::empty({sizes.begin(), sizes.size()}, dtype, std::nullopt, like.device());
  });
}

Tensor without_padding(const Tensor& tensor, int head_dim) {
  if (tensor.size(3) == head_dim) {
    return tensor;
  }
  Tensor padded = tensor;
  return make_contiguous(torch::stable::narrow(padded, 3, 0, head_dim));
}

TensorView view(const Tensor& tensor) {
  return {.data = tensor.data_ptr(),
          .batch_stride = tensor.stride(0),
          .row_stride = tensor.stride(1),
          .head_stride = tensor.stride(2)};
}

RowStatistics row_statistics(const Tensor& tensor) {
  return {
      .data = tensor.data_ptr(), .batch_stride = tensor.stride(0), .head_stride = tensor.stride(1)};
}

}  // namespace fa::api
