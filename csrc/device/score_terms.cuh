// SPDX-License-Identifier: BSD-3-Clause
// common/score_terms.h for a warp's tile of scores (queries, keys), the first of (first_query,
// first_key), and for the end of its rows.
#pragma once

#include <cfloat>
#include <cmath>

#include "common/math.h"
#include "common/window.h"
#include "device/fragment.cuh"

namespace fa::device {

// Below, the first terms of tanh's series are exact to a few units in the last place.
inline constexpr float kSmallTanh = 0.25f;
FA_DEVICE float tanh_of_small(float x) {
  const float square = x * x;
  const float series = fmaf(square, fmaf(square, -17.0f / 315, 2.0f / 15), -1.0f / 3);
  return fmaf(series * square, x, x);
}

// To a few units in the last place. Where x is small, 1 - 2 / (1 + e^2x) has lost digits.
FA_DEVICE float tanh_approx(float x) {
  const float e = ptx::exp2_approx(2 * kLog2E * x);
  return fabsf(x) < kSmallTanh ? tanh_of_small(x)
                               : fmaf(-2.0f, ptx::reciprocal_approx(1.0f + e), 1.0f);
}

// By whole warps: each score becomes softcap * tanh(scale * score / softcap), softcap > 0.
// visit(tanh, row_of_thread, col_block, i) is told of each. Mostly all of a tile are small: then no
// unit for special functions, of which the softmax wants all, is needed, and the bits are the same.
template <typename Scores, typename Visit>
FA_DEVICE void cap_scores(Scores& r_scores, float scale, float softcap, Visit&& visit) {
  const float factor = fminf(fmaxf(scale / softcap, -FLT_MAX), FLT_MAX);  // 0 * inf is NaN
  const auto cap = [&](auto&& tanh_of) {
    r_scores.transform([&](float score, int row, int block, int i) {
      const float tanh = tanh_of(score * factor);
      visit(tanh, row, block, i);
      return softcap * tanh;
    });
  };
  float largest = 0.0f;
  r_scores.for_each([&](float score, int) { largest = fmaxf(largest, fabsf(score)); });
  if (__all_sync(~0u, largest * fabsf(factor) < kSmallTanh)) {
    cap(tanh_of_small);
  } else {
    cap(tanh_approx);
  }
}

// How far each key lies from the key that is aligned with its query.
template <typename Scores>
class AlibiDistances {
 public:
  FA_DEVICE AlibiDistances(const WindowMask& window, int first_query, int first_key)
      : first_(static_cast<float>(first_key + Scores::col(0, 0) - first_query - Scores::row(0) -
                                  window.offset())) {}

  FA_DEVICE float at(int row, int block, int i) const {
    const int on = Scores::first_col(block) + i % 2 - Scores::first_row(row);
    return fabsf(first_ + static_cast<float>(on));
  }

 private:
  float first_;  // of the thread's first score, to the right of the diagonal
};

template <typename Scores>
FA_DEVICE void add_alibi(Scores& r_scores, float slope, const WindowMask& window, int first_query,
                         int first_key) {
  const AlibiDistances<Scores> distances(window, first_query, first_key);
  r_scores.transform([&](float score, int row, int block, int i) {
    return fmaf(-slope, distances.at(row, block, i), score);
  });
}

// The end of a row with a sink, -inf for none: sum is that of exp(score - max), and max is -inf
// where no key was seen. A row that sees nothing has lse = sink. `normalizer` is what turns
// exp(score - max) into exp(score - lse), or 0.
FA_DEVICE void finalize_with_sink(float sum, float max, float sink, float& lse, float& normalizer) {
  const float largest = fmaxf(max, sink);
  if (largest == -INFINITY) {
    lse = -INFINITY;
    normalizer = 0.0f;
  } else {
    const float rescale = expf(max - largest);
    const float sum_with_sink = fmaf(sum, rescale, expf(sink - largest));
    lse = largest + logf(sum_with_sink);
    normalizer = rescale / sum_with_sink;
  }
}

}  // namespace fa::device
