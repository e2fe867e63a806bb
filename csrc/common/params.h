// SPDX-License-Identifier: BSD-3-Clause
// What a kernel is given. Plain data: filled by api/, read by every family, passed to CUDA by
// value.
#pragma once

#include <cstdint>

#include "common/score_rules.h"
#include "common/seqlen.h"
#include "common/tile_map.h"
#include "common/types.h"
#include "common/window.h"
#include "common/workspace.h"

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
  int head_dim;    // of queries and keys
  int head_dim_v;  // of values and out

  FA_HOST_DEVICE constexpr int group_size() const { return num_heads / num_heads_kv; }
};

// One value for each query of each head, contiguous along the queries: (batch, num_heads,
// seqlen_q), or (num_heads, total_q) with batch_stride 0 where sequences are packed.
struct RowStatistics {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;

  template <typename Real>
  FA_HOST_DEVICE Real* row(int64_t batch, int64_t head) const {
    return static_cast<Real*>(data) + batch * batch_stride + head * head_stride;
  }
};

// Row statistics (softmax_lse and its kin) are float, or double where the inputs are double.
// Without sequences of their own all batch entries have the lengths of the shape. With them none is
// longer, and the window is that of sequences of those lengths; of packed ones the shape may have
// all rows.
struct FwdParams {
  Shape shape;
  WindowMask window;
  double softmax_scale;
  TensorView q;               // (batch, seqlen_q, num_heads, head_dim)
  TensorView k;               // (batch, seqlen_k, num_heads_kv, head_dim)
  TensorView v;               // (batch, seqlen_k, num_heads_kv, head_dim_v)
  TensorView out;             // (batch, seqlen_q, num_heads, head_dim_v)
  RowStatistics softmax_lse;  // natural log; for a row that sees no key -inf, or its head's sink
  Sequences queries = {};
  Sequences keys = {};
  ScoreRules rules = {};    // of rows whose score mode is general
  TileMap tile_map = {};    // workspace of the CUDA families, where data hide keys
  PairBits pair_bits = {};  // workspace of rows that read them
};

struct BwdParams {
  Shape shape;
  WindowMask window;
  double softmax_scale;
  TensorView q;               // (batch, seqlen_q, num_heads, head_dim)
  TensorView k;               // (batch, seqlen_k, num_heads_kv, head_dim)
  TensorView v;               // (batch, seqlen_k, num_heads_kv, head_dim_v)
  TensorView out;             // (batch, seqlen_q, num_heads, head_dim_v)
  TensorView dout;            // (batch, seqlen_q, num_heads, head_dim_v)
  TensorView dq;              // (batch, seqlen_q, num_heads, head_dim)
  TensorView dk;              // (batch, seqlen_k, num_heads_kv, head_dim)
  TensorView dv;              // (batch, seqlen_k, num_heads_kv, head_dim_v)
  RowStatistics softmax_lse;  // from the forward pass
  RowStatistics dlse;         // gradient of softmax_lse; null: none reaches it
  RowStatistics delta;        // workspace of the CPU family: rowsum(dout * out) - dlse
  BwdWorkspace workspace;     // of the CUDA families
  Sequences queries = {};
  Sequences keys = {};
  ScoreRules rules = {};    // of rows whose score mode is general
  TileMap tile_map = {};    // workspace of the CUDA families, where data hide keys
  PairBits pair_bits = {};  // workspace of rows that read them
  // Gradient of the bias, summed over what was broadcast there; null: not asked for. Strides of
  // dimensions of size 1 are 0. Of the bias's dtype.
  ScoreTensor dbias = {};
  HeadGradient dslopes = {};  // of terms.alibi; its tiles are of keys, on the CPU of queries
  HeadGradient dsinks = {};   // of terms.sinks; its tiles are of queries
};

// What a row with such tiles that reads pair bits needs of them, without their memory. Params: of a
// pass.
template <typename Params>
constexpr PairBits pair_bits_of(const Params& params, int tile_m, int tile_n) {
  const Shape& shape = params.shape;
  return PairBits::of(params.rules, shape.batch, shape.num_heads, shape.seqlen_q, shape.seqlen_k,
                      tile_m, tile_n);
}

}  // namespace fa
