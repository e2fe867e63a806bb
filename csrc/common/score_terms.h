// SPDX-License-Identifier: BSD-3-Clause
// What makes a score, a probability and their sum beside scale, bias and masks:
//   score  = cap(softmax_scale * q k^T) - slope * |i + seqlen_k - seqlen_q - j| + bias,
//            cap(x) = softcap * tanh(x / softcap)
//   lse    = log(sum of exp(score) + exp(sink))
//   out    = sum of dropout(exp(score - lse)) * v
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/types.h"
#include "common/window.h"

namespace fa {

// A number for each head of each batch entry: float, or double where the inputs are double. Strides
// are in elements, and 0 where one number stands for all.
struct HeadValues {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;

  template <typename Real>
  FA_HOST_DEVICE Real& at(int64_t batch, int64_t head) const {
    return static_cast<Real*>(data)[batch * batch_stride + head * head_stride];
  }
};

// The defaults: none.
struct ScoreTerms {
  double softcap = 0;     // 0: scores are not capped
  HeadValues alibi = {};  // slopes; null: none
  HeadValues sinks = {};  // of heads alone; null: none, as is one of -inf
  Dropout dropout = {};   // acts on the normalised probabilities, and not on lse
  // Forward: where the largest score of all seen pairs of each head goes, of heads alone, -inf to
  // begin with; null: nobody asks.
  HeadValues max_logit = {};

  FA_HOST_DEVICE constexpr bool any() const {
    return softcap != 0 || alibi.data != nullptr || sinks.data != nullptr || dropout.any() ||
           max_logit.data != nullptr;
  }
};

// By what a slope is multiplied, and what a score's gradient is multiplied by for that of the
// slope. window: of the pair's sequences.
FA_HOST_DEVICE constexpr int alibi_distance(const WindowMask& window, int query, int key) {
  const int distance = key - query - window.offset();
  return distance < 0 ? distance : -distance;
}

// The gradient of slopes or sinks. CUDA families and that of the CPU sum it in two steps, so that
// the order is one whatever blocks and threads do: tile by tile into `partial`, then over tiles.
struct HeadGradient {
  HeadValues sums;          // (batch, heads), or (heads) with batch_stride 0; null: nobody asks
  void* partial = nullptr;  // (num_heads, tiles): float, or double where the inputs are double
  int64_t tiles = 0;        // of one head, over all sequences

  template <typename Real>
  FA_HOST_DEVICE Real& at(int64_t head, int64_t tile) const {
    return static_cast<Real*>(partial)[head * tiles + tile];
  }
};

}  // namespace fa
