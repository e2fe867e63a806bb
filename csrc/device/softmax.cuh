// SPDX-License-Identifier: BSD-3-Clause
// Softmax over keys that arrive tile by tile. For each row it keeps a base m near the largest score
// so far and l = sum of exp(scale * (score - m)). A masked score is -inf. A row that has seen only
// masked scores has m = -inf and l = 0, and -inf - -inf, which is NaN, is never formed.
//
// m is raised only when a score exceeds it by more than kSlack octaves. Until then p is at most
// 2^kSlack instead of 1, which costs no precision in floating point and cancels in the division by
// l; and what was summed before, which would have to be rescaled, stays as it is.
#pragma once

#include <cmath>

#include "common/math.h"
#include "device/fragment.cuh"

namespace fa::device {

template <int kRowsPerThread>
class OnlineSoftmax {
 public:
  using RowValues = float[kRowsPerThread];

  // The scores are multiplied by exp2's share of the scale inside one fma; the scale must be > 0.
  explicit FA_DEVICE OnlineSoftmax(float softmax_scale) : scale_log2_(softmax_scale * kLog2E) {
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      max_[row] = -INFINITY;
      sum_[row] = 0.0f;
    }
  }

  // Turns raw scores into exp(scale * (score - m)). True if the warp must multiply what it summed
  // from earlier tiles by `rescale`.
  template <typename Scores>
  FA_DEVICE bool update(Scores& r_scores, RowValues& rescale) {
    static_assert(Scores::kRowsPerThread == kRowsPerThread);
    RowValues tile_max;
#pragma unroll
    for (float& max : tile_max) {
      max = -INFINITY;
    }
    r_scores.transform([&](float score, int row, int, int) {
      tile_max[row] = fmaxf(tile_max[row], score);
      return score;
    });

    RowValues base;
    bool raised = false;
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      const float largest = row_max(tile_max[row]);
      const float before = max_[row];
      const bool raise = (largest - before) * scale_log2_ > kSlack;
      max_[row] = raise ? largest : before;
      base[row] = base_of(max_[row]);
      rescale[row] = raise ? ptx::exp2_approx(fmaf(before, scale_log2_, -base[row])) : 1.0f;
      sum_[row] *= rescale[row];
      raised |= raise;
    }

    r_scores.transform([&](float score, int row, int, int) {
      const float p = ptx::exp2_approx(fmaf(score, scale_log2_, -base[row]));
      sum_[row] += p;  // of this thread's columns; finalize adds the quad's
      return p;
    });
    return __any_sync(~0u, raised);
  }

  // lse = log(sum of exp(scale * score)), -inf where no key was seen; `normalizer` is 1 / l, or 0.
  FA_DEVICE void finalize(RowValues& lse, RowValues& normalizer) const {
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      const float sum = row_sum(sum_[row]);
      const bool sees_a_key = !(sum == 0.0f);  // a NaN is seen, and stays NaN
      lse[row] = sees_a_key ? fmaf(base_of(max_[row]), kLn2, logf(sum)) : -INFINITY;
      normalizer[row] = sees_a_key ? 1.0f / sum : 0.0f;
    }
  }

 private:
  static constexpr float kSlack = 8.0f;

  // What exponents are measured from: m in units of log2, and any finite number where m = -inf.
  FA_DEVICE float base_of(float max) const { return max == -INFINITY ? 0.0f : max * scale_log2_; }

  float scale_log2_;
  RowValues max_;
  RowValues sum_;
};

}  // namespace fa::device
