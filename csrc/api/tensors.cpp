// SPDX-License-Identifier: BSD-3-Clause
#include "api/tensors.h"

#include <algorithm>
#include <array>
#include <limits>
#include <ostream>

#include "common/check.h"

namespace fa::api {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;

constexpr int64_t kCudaAlignment = 16;  // bytes: one cp.async, and what TMA asks of strides
constexpr size_t kMaxDims = 4;          // of a tensor made here

struct DeviceOf {
  const Argument& argument;
};

std::ostream& operator<<(std::ostream& stream, const DeviceOf& shown) {
  const torch::stable::Device& device = shown.argument.device;
  return device.is_cpu() ? stream << "cpu" : stream << "cuda:" << device.index();
}

bool same_device(const Argument& a, const Argument& b) {
  return a.device.type() == b.device.type() &&
         (a.device.is_cpu() || a.device.index() == b.device.index());
}

void check_same_kind(const Argument& argument, const Argument& reference) {
  const Dtype expected = dtype_of(reference);
  const Dtype dtype = dtype_of(argument);
  check(dtype == expected, ErrorKind::kType, argument.name, ": expected ", name_of(expected),
        " like ", reference.name, ", got ", name_of(dtype));
  check_device(argument, reference);
}

void check_size(const Argument& argument, int dim, const char* dim_name, int64_t expected) {
  check(argument.sizes[dim] == expected, ErrorKind::kValue, argument.name, ": expected ", dim_name,
        " ", expected, ", got ", argument.sizes[dim], " in shape ", ShapeOf{argument.sizes});
}

int check_extent(const Argument& argument, int dim, const char* dim_name, int64_t limit) {
  const int64_t size = argument.sizes[dim];
  check(size <= limit, ErrorKind::kValue, argument.name, ": expected ", dim_name, " at most ",
        limit, ", got ", size);
  return static_cast<int>(size);
}

// Runs what makes a tensor on the device of `like`. torch's stable ABI tells that it failed, not
// why; of a plain allocation or copy, the reason is lack of memory.
template <typename Make>
Tensor allocate(const Argument& like, int64_t elements, Make&& make) {
  try {
    return make();
  } catch (const std::exception&) {
    throw Error(ErrorKind::kOutOfMemory, concat(like.device.is_cpu() ? "CPU" : "CUDA",
                                                " out of memory. torch could not make a tensor of ",
                                                elements, " elements on ", DeviceOf{like}));
  }
}

Layout layout_of(const Argument& argument) {
  Layout layout = {.address = reinterpret_cast<uintptr_t>(argument.tensor.const_data_ptr()),
                   .element_bytes = bytes_of(dtype_of(argument)),
                   .on_cuda = argument.device.is_cuda()};
  std::copy_n(argument.sizes.begin(), layout.sizes.size(), layout.sizes.begin());
  std::copy_n(argument.strides.begin(), layout.strides.size(), layout.strides.begin());
  return layout;
}

// As torch's stable ABI numbers it.
int32_t torch_number(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return aoti_torch_dtype_float64();
    case Dtype::kFloat32:
    case Dtype::kTf32:
      return aoti_torch_dtype_float32();
    case Dtype::kFloat16:
      return aoti_torch_dtype_float16();
    case Dtype::kBFloat16:
      break;
  }
  return aoti_torch_dtype_bfloat16();
}

}  // namespace

std::ostream& operator<<(std::ostream& stream, const ShapeOf& shape) {
  stream << "(";
  for (size_t dim = 0; dim < shape.sizes.size(); ++dim) {
    stream << (dim == 0 ? "" : ", ") << shape.sizes[dim];
  }
  return stream << (shape.sizes.size() == 1 ? ",)" : ")");
}

void check_device(const Argument& argument, const Argument& reference) {
  check(same_device(argument, reference), ErrorKind::kValue, argument.name, ": expected device ",
        DeviceOf{reference}, " like ", reference.name, ", got ", DeviceOf{argument});
}

void check_shape(const Argument& argument, IntHeaderOnlyArrayRef expected) {
  check(argument.sizes.equals(expected), ErrorKind::kValue, argument.name, ": expected shape ",
        ShapeOf{expected}, ", got ", ShapeOf{argument.sizes});
}

Argument::Argument(const char* name, const Tensor& tensor)
    : name(name),
      tensor(tensor),
      sizes(tensor.sizes()),
      strides(tensor.strides()),
      scalar_type(tensor.scalar_type()),
      device(tensor.device()) {}

Dtype dtype_of(const Argument& argument) {
  switch (argument.scalar_type) {
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
                         torch::headeronly::toString(argument.scalar_type)));
  }
}

Dtype statistics_dtype(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

Shape check_qkv(const Argument& q, const Argument& k, const Argument& v) {
  for (const Argument* argument : {&q, &k, &v}) {
    check(argument->sizes.size() == 4, ErrorKind::kValue, argument->name,
          ": expected 4 dimensions (batch, seqlen, heads, head_dim), got ", argument->sizes.size(),
          " in shape ", ShapeOf{argument->sizes});
  }
  check_same_kind(k, q);
  check_same_kind(v, q);

  const int64_t int_limit = std::numeric_limits<int>::max();
  const Shape shape{.batch = check_extent(q, 0, "batch", int_limit),
                    .num_heads = check_extent(q, 2, "heads", int_limit),
                    .num_heads_kv = check_extent(k, 2, "heads", int_limit),
                    .seqlen_q = check_extent(q, 1, "seqlen", kMaxSeqlen),
                    .seqlen_k = check_extent(k, 1, "seqlen", kMaxSeqlen),
                    .head_dim = check_extent(q, 3, "head_dim", int_limit),
                    .head_dim_v = check_extent(v, 3, "head_dim", int_limit)};
  check(shape.head_dim >= 1, ErrorKind::kValue, "q: expected head_dim of at least 1, got 0");
  check(shape.head_dim_v >= 1, ErrorKind::kValue, "v: expected head_dim of at least 1, got 0");
  check_size(k, 0, "batch", shape.batch);
  check_size(k, 3, "head_dim", shape.head_dim);
  check_size(v, 0, "batch", shape.batch);
  check_size(v, 1, "seqlen", shape.seqlen_k);
  check_size(v, 2, "heads", shape.num_heads_kv);
  const bool divides =
      shape.num_heads_kv == 0 ? shape.num_heads == 0 : shape.num_heads % shape.num_heads_kv == 0;
  check(divides, ErrorKind::kValue, "k, v: expected a number of heads that divides the ",
        shape.num_heads, " heads of q, got ", shape.num_heads_kv);
  return shape;
}

void check_row_statistics(const Argument& argument, const Argument& q) {
  const int64_t expected_shape[] = {q.sizes[0], q.sizes[2], q.sizes[1]};
  check_shape(argument, expected_shape);
  const Dtype expected = statistics_dtype(dtype_of(q));
  const Dtype dtype = dtype_of(argument);
  check(dtype == expected, ErrorKind::kType, argument.name, ": expected ", name_of(expected),
        " for these q, k, v, got ", name_of(dtype));
  check_device(argument, q);
}

void check_like_out(const Argument& argument, const Argument& q, const Argument& v) {
  const int64_t expected_shape[] = {q.sizes[0], q.sizes[1], q.sizes[2], v.sizes[3]};
  check_shape(argument, expected_shape);
  check_same_kind(argument, q);
}

void check_integers(const Argument& argument, std::initializer_list<int64_t> sizes,
                    const Argument& q) {
  check(argument.scalar_type == ScalarType::Int, ErrorKind::kType, argument.name,
        ": expected int32, got ", torch::headeronly::toString(argument.scalar_type));
  check_shape(argument, sizes);
  check_device(argument, q);
}

WindowMask check_window(const Shape& shape, int64_t window_left, int64_t window_right) {
  for (int64_t bound : {window_left, window_right}) {
    check(bound >= -1, ErrorKind::kValue,
          "window_size: expected -1 (unbounded) or a number of keys on each side, got (",
          window_left, ", ", window_right, ")");
  }
  return {shape.seqlen_q, shape.seqlen_k, window_left, window_right};
}

int kernel_head_dim(const Argument& argument) {
  const int head_dim = static_cast<int>(argument.sizes[3]);
  const int of_load = static_cast<int>(kCudaAlignment) / bytes_of(dtype_of(argument));
  return argument.device.is_cpu() ? head_dim : round_up(head_dim, of_load);
}

const char* why_copied(const Layout& layout) {
  const auto& [sizes, strides, address, element_bytes, on_cuda] = layout;
  if (strides[3] != 1 && sizes[3] != 1) {
    return "its head_dim is not contiguous";
  }
  if (!on_cuda) {
    return nullptr;
  }
  if (sizes[3] * element_bytes % kCudaAlignment != 0) {
    return element_bytes == 2 ? "its head_dim is not a multiple of 8"
                              : "its head_dim is not a multiple of 4";
  }
  if (address % kCudaAlignment != 0) {
    return "its address is not a multiple of 16 bytes";
  }
  for (int dim = 0; dim < 3; ++dim) {
    if (sizes[dim] > 1 && strides[dim] * element_bytes % kCudaAlignment != 0) {
      return "its strides are not multiples of 16 bytes";
    }
  }
  return nullptr;
}

Tensor readable(const Argument& argument) {
  const Tensor& tensor = argument.tensor;
  if (why_copied(layout_of(argument)) == nullptr) {
    return tensor;
  }
  const int64_t padding = kernel_head_dim(argument) - argument.sizes[3];
  return allocate(argument, tensor.numel(), [&] {
    if (padding > 0) {
      const int64_t last_dim_padding[] = {0, padding};
      return torch::stable::contiguous(torch::stable::pad(tensor, {last_dim_padding, 2}));
    }
    // contiguous() returns the tensor itself where only its base is misaligned; clone() never does.
    Tensor copy = torch::stable::contiguous(tensor);
    return copy.data_ptr() == tensor.data_ptr() ? torch::stable::clone(tensor) : copy;
  });
}

Tensor make_contiguous(const Argument& argument) {
  const Tensor& tensor = argument.tensor;
  if (tensor.is_contiguous()) {
    return tensor;
  }
  return allocate(argument, tensor.numel(), [&] { return torch::stable::contiguous(tensor); });
}

// torch::stable::empty() looks the operator up by name and boxes its arguments at every call, which
// takes longer than the allocation. On the CPU only new_empty fills new memory where torch is told
// to (torch.utils.deterministic.fill_uninitialized_memory); on CUDA empty_strided does too and is
// faster.
Tensor empty(std::initializer_list<int64_t> sizes, const Argument& like, Dtype dtype) {
  std::array<int64_t, kMaxDims> strides;
  int64_t elements = 1;
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    const int64_t size = sizes.begin()[dim];
    strides.at(dim) = stride;
    elements *= size;
    stride *= std::max<int64_t>(size, 1);
  }
  return allocate(like, elements, [&] {
    const auto dims = static_cast<int64_t>(sizes.size());
    int32_t number = torch_number(dtype);
    AtenTensorHandle tensor = nullptr;
    TORCH_ERROR_CODE_CHECK(
        like.device.is_cpu()
            ? aoti_torch_aten_new_empty(like.tensor.get(), sizes.begin(), dims, &number,
                                        /*layout=*/nullptr, /*device=*/nullptr, 0,
                                        /*pin_memory=*/nullptr, &tensor)
            : aoti_torch_empty_strided(dims, sizes.begin(), strides.data(), number,
                                       aoti_torch_device_type_cuda(), like.device.index(),
                                       &tensor));
    return Tensor(tensor);
  });
}

Tensor zeros_like(const Argument& argument) {
  return allocate(argument, argument.tensor.numel(),
                  [&] { return torch::stable::new_zeros(argument.tensor, argument.sizes); });
}

Tensor scratch(int64_t bytes, const Argument& like) {
  return empty({ceil_div(bytes, int64_t{sizeof(float)})}, like, Dtype::kFloat32);
}

Tensor without_padding(const Tensor& tensor, int head_dim) {
  if (tensor.size(3) == head_dim) {
    return tensor;
  }
  Tensor padded = tensor;
  const Tensor narrowed = torch::stable::narrow(padded, 3, 0, head_dim);
  return make_contiguous({"a result", narrowed});
}

TensorView view(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {.data = tensor.data_ptr(),
          .batch_stride = strides[0],
          .row_stride = strides[1],
          .head_stride = strides[2]};
}

RowStatistics row_statistics(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {.data = tensor.data_ptr(), .batch_stride = strides[0], .head_stride = strides[1]};
}

}  // namespace fa::api
