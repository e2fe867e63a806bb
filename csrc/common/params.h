// SPDX-License-Identifier: BSD-3-Clause
// What a kernel is given. Plain data: filled by api/, read by every family, passed to CUDA by
// value.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "common/window.h"

namespace fa {

// A (batch, seqlen, heads, head_dim) tensor. Strides are in elements and 64 bits wide; head_dim is
// contiguous.
struct TensorView {
  void* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;

  FA_HOST_DEVICE constexpr int64_t offset(int64_t batch, int64_t row, int64_t head) const {
    return batch * batch_stride + row * row_stride + head * head_stride;
  }

  template <typename Element>
  FA_HOST_DEVICE Element* row(int64_t batch, int64_t row, int64_t head) const {
    return static_cast<Element*>(data) + offset(batch, row, head);
  }
};

struct Shape {
  int batch;
  int num_heads;     // of queries; a multiple of num_heads_kv
  int num_heads_kv;  // of keys and values
  int seqlen_q;
  int seqlen_k;
  int head_dim;

  FA_HOST_DEVICE constexpr int group_size() const { return num_heads / num_heads_kv; }

  // First element of row (batch, head) in a contiguous (batch, num_heads, seqlen_q) tensor.
  FA_HOST_DEVICE constexpr int64_t row_statistics_offset(int64_t batch_index, int64_t head) const {
    return (batch_index * num_heads + head) * seqlen_q;
  }
};

// Row statistics (softmax_lse and its kin) are float, or double where the inputs are double.
struct FwdParams {
  Shape shape;
  WindowMask window;
  double softmax_scale;
  TensorView q;       // (batch, seqlen_q, num_heads, head_dim)
  TensorView k;       // (batch, seqlen_k, num_heads_kv, head_dim)
  TensorView v;       // (batch, seqlen_k, num_heads_kv, head_dim)
  TensorView out;     // (batch, seqlen_q, num_heads, head_dim)
  void* softmax_lse;  // (batch, num_heads, seqlen_q), natural log; -inf for a row that sees no key
};

struct BwdParams {
  Shape shape;
  WindowMask window;
  double softmax_scale;
  TensorView q;             // (batch, seqlen_q, num_heads, head_dim)
  TensorView k;             // (batch, seqlen_k, num_heads_kv, head_dim)
  TensorView v;             // (batch, seqlen_k, num_heads_kv, head_dim)
  TensorView out;           // (batch, seqlen_q, num_heads, head_dim)
  TensorView dout;          // (batch, seqlen_q, num_heads, head_dim)
  const void* softmax_lse;  // (batch, num_heads, seqlen_q), from the forward pass
  const void* dlse;         // (batch, num_heads, seqlen_q), or null: no gradient reaches the LSE
  void* delta;              // (batch, num_heads, seqlen_q) workspace: rowsum(dout * out) - dlse
  TensorView dq;            // (batch, seqlen_q, num_heads, head_dim)
  TensorView dk;            // (batch, seqlen_k, num_heads_kv, head_dim)
  TensorView dv;            // (batch, seqlen_k, num_heads_kv, head_dim)
};

}  // namespace fa
