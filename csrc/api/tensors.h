// SPDX-License-Identifier: BSD-3-Clause
// torch tensors -> checked, kernel-ready views. Every sentence names the argument, what was
// expected and what came.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <ostream>

#include "common/params.h"
#include "dispatch/registry.h"

namespace fa::api {

using torch::stable::Tensor;

// An argument: its name in messages, and what is asked of its tensor time and again, read once.
struct Argument {
  Argument(const char* name, const Tensor& tensor);

  const char* name;
  const Tensor& tensor;
  torch::headeronly::IntHeaderOnlyArrayRef sizes;
  torch::headeronly::IntHeaderOnlyArrayRef strides;
  torch::headeronly::ScalarType scalar_type;
  torch::stable::Device device;
};

Dtype dtype_of(const Argument& argument);

// Row statistics are float, or double where the inputs are double.
Dtype statistics_dtype(Dtype dtype);

// A shape in a message, put into words only where there is a message.
struct ShapeOf {
  torch::headeronly::IntHeaderOnlyArrayRef sizes;
};
std::ostream& operator<<(std::ostream& stream, const ShapeOf& shape);

void check_device(const Argument& argument, const Argument& reference);
void check_shape(const Argument& argument, torch::headeronly::IntHeaderOnlyArrayRef expected);

// Checks rank, dtype, device and shape of q, k, v against each other. The batch is that of q.
Shape check_qkv(const Argument& q, const Argument& k, const Argument& v);

// Checks a tensor like the result for q and v.
void check_like_out(const Argument& argument, const Argument& q, const Argument& v);

// Checks a (batch, heads, seqlen_q) tensor of row statistics for the problem of a q.
void check_row_statistics(const Argument& argument, const Argument& q);

// Checks an int32 tensor on the device of q.
void check_integers(const Argument& argument, std::initializer_list<int64_t> sizes,
                    const Argument& q);

// Checks the window's bounds: -1 (unbounded) or a number of keys.
WindowMask check_window(const Shape& shape, int64_t window_left, int64_t window_right);

// head_dim as the kernels of the argument's device take it: on CUDA, where loads are 16 bytes wide,
// a multiple of 8, or of 4 in float32.
int kernel_head_dim(const Argument& argument);

// The tensor itself where a kernel can read it in place; otherwise a copy with a contiguous last
// dimension and, on CUDA, 16-byte aligned rows and head_dim padded with zeros to kernel_head_dim.
Tensor readable(const Argument& argument);

// How a (batch, seqlen, heads, head_dim) tensor lies in memory. Strides are in elements.
struct Layout {
  std::array<int64_t, 4> sizes;
  std::array<int64_t, 4> strides;
  uint64_t address;  // or its remainder by 16
  int64_t element_bytes;
  bool on_cuda;
};

// Why no kernel can read a tensor where it lies, so that readable() copies it; null where they can.
const char* why_copied(const Layout& layout);

// The tensor itself, or a contiguous copy.
Tensor make_contiguous(const Argument& argument);

// A new contiguous tensor on the device of `like`.
Tensor empty(std::initializer_list<int64_t> sizes, const Argument& like, Dtype dtype);

// A new contiguous tensor of zeros like another.
Tensor zeros_like(const Argument& argument);

// Memory on the device of `like`, for kernels alone.
Tensor scratch(int64_t bytes, const Argument& like);

// The first head_dim columns of a kernel's output, contiguous.
Tensor without_padding(const Tensor& tensor, int head_dim);

TensorView view(const Tensor& tensor);

// Of a contiguous (batch, heads, seqlen_q) tensor.
RowStatistics row_statistics(const Tensor& tensor);

}  // namespace fa::api
