// SPDX-License-Identifier: BSD-3-Clause
// Softmax over keys that arrive tile by tile. For each row it keeps m = the largest score so far
// and l = sum of exp(scale * (score - m)); a new tile may raise m, and what was summed before is
// then multiplied by the returned factor. A masked score is -inf. A row that has seen only masked
// scores has m = -inf and l = 0, and -inf - -inf, which is NaN, is never formed.
#pragma once

#include <cmath>

#include "common/math.h"
#include "device/fragment.cuh"

namespace fa::device {

class OnlineSoftmax {
 public:
  // The scores are multiplied by exp2's share of the scale inside one fma; the scale must be > 0.
  explicit FA_DEVICE OnlineSoftmax(float softmax_scale) : scale_log2_(softmax_scale * kLog2E) {
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      max_[row] = -INFINITY;
      sum_[row] = 0.0f;
    }
  }

  // Turns raw scores into exp(scale * (score - m)); `rescale` is the factor of earlier tiles.
  template <int kCols>
  FA_DEVICE void update(Accumulator<kCols>& r_scores, float (&rescale)[kRowsPerThread]) {
    float new_max[kRowsPerThread] = {max_[0], max_[1]};
    r_scores.transform([&](float score, int row, int, int) {
      new_max[row] = fmaxf(new_max[row], score);
      return score;
    });

    float base[kRowsPerThread];
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      new_max[row] = row_max(new_max[row]);
      base[row] = base_of(new_max[row]);
      rescale[row] = ptx::exp2_approx(fmaf(max_[row], scale_log2_, -base[row]));
      max_[row] = new_max[row];
      sum_[row] *= rescale[row];
    }

    r_scores.transform([&](float score, int row, int, int) {
      const float p = ptx::exp2_approx(fmaf(score, scale_log2_, -base[row]));
      sum_[row] += p;  // of this thread's columns; finalize adds the quad's
      return p;
    });
  }

  // lse = log(sum of exp(scale * score)), -inf where no key was seen; `normalizer` is 1 / l, or 0.
  FA_DEVICE void finalize(float (&lse)[kRowsPerThread], float (&normalizer)[kRowsPerThread]) const {
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      const float sum = row_sum(sum_[row]);
      const bool sees_a_key = !(sum == 0.0f);  // a NaN is seen, and stays NaN
      lse[row] = sees_a_key ? fmaf(base_of(max_[row]), kLn2, logf(sum)) : -INFINITY;
      normalizer[row] = sees_a_key ? 1.0f / sum : 0.0f;
    }
  }

 private:
  // What exponents are measured from: m in units of log2, and any finite number where m = -inf.
  FA_DEVICE float base_of(float max) const { return max == -INFINITY ? 0.0f : max * scale_log2_; }

  float scale_log2_;
  float max_[kRowsPerThread];
  float sum_[kRowsPerThread];
};

// log2-domain LSE with which p = exp2(scale_log2 * score - lse_log2). A row that sees no key has
// lse = -inf; +inf in its place makes every p of the row exactly 0.
FA_DEVICE float lse_to_log2(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2E; }

// p * (dp - delta), the gradient of the scaled score; 0 where p is, whatever dp and delta are.
FA_DEVICE float softmax_gradient(float p, float dp, float delta) {
  return p == 0.0f ? 0.0f : p * (dp - delta);
}

}  // namespace fa::device
