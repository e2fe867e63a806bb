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
#include "device/score_terms.cuh"

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

  // The largest score of each row.
  template <typename Scores>
  static FA_DEVICE void largest(const Scores& r_scores, RowValues& largest) {
    static_assert(Scores::kRowsPerThread == kRowsPerThread);
#pragma unroll
    for (float& max : largest) {
      max = -INFINITY;
    }
    r_scores.for_each([&](float score, int row) { largest[row] = fmaxf(largest[row], score); });
#pragma unroll
    for (float& max : largest) {
      max = row_max(max);
    }
  }

  // Whether scores this large raise m, in any row of this thread.
  FA_DEVICE bool raises(const RowValues& largest) const {
    bool any = false;
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      any |= raises_row(largest[row], row);
    }
    return any;
  }

  // Raises m where it must be. True if it did in any row of this thread; what was summed from
  // earlier tiles must then be multiplied by `rescale`.
  FA_DEVICE bool raise(const RowValues& largest, RowValues& rescale) {
    bool any = false;
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      const float before = max_[row];
      const bool raised = raises_row(largest[row], row);
      max_[row] = raised ? largest[row] : before;
      rescale[row] =
          raised ? ptx::exp2_approx(fmaf(before, scale_log2_, -base_of(max_[row]))) : 1.0f;
      sum_[row] *= rescale[row];
      any |= raised;
    }
    return any;
  }

  // Turns raw scores into exp(scale * (score - m)).
  template <typename Scores>
  FA_DEVICE void exponentiate(Scores& r_scores) {
    RowValues base;
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      base[row] = base_of(max_[row]);
    }
    r_scores.transform([&](float score, int row, int, int) {
      const float p = ptx::exp2_approx(fmaf(score, scale_log2_, -base[row]));
      sum_[row] += p;  // of this thread's columns
      return p;
    });
  }

  // l, of the columns that this warp has seen.
  FA_DEVICE void sums(RowValues& sums) const {
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      sums[row] = row_sum(sum_[row]);
    }
  }

  // From all of l: lse = log(sum of exp(scale * score)), -inf where no key was seen; `normalizer`
  // is 1 / l, or 0. A sink, where there is one, joins the sum.
  FA_DEVICE void finalize(const RowValues& sums, RowValues& lse, RowValues& normalizer,
                          const float* sink = nullptr) const {
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      const bool sees_a_key = !(sums[row] == 0.0f);  // a NaN is seen, and stays NaN
      if (sink != nullptr && *sink != -INFINITY) {
        const float max = sees_a_key ? base_of(max_[row]) * kLn2 : -INFINITY;
        finalize_with_sink(sums[row], max, *sink, lse[row], normalizer[row]);
        continue;
      }
      lse[row] = sees_a_key ? fmaf(base_of(max_[row]), kLn2, logf(sums[row])) : -INFINITY;
      normalizer[row] = sees_a_key ? 1.0f / sums[row] : 0.0f;
    }
  }

 private:
  static constexpr float kSlack = 8.0f;

  FA_DEVICE bool raises_row(float largest, int row) const {
    return (largest - max_[row]) * scale_log2_ > kSlack;
  }

  // What exponents are measured from: m in units of log2, and any finite number where m = -inf.
  FA_DEVICE float base_of(float max) const { return max == -INFINITY ? 0.0f : max * scale_log2_; }

  float scale_log2_;
  RowValues max_;
  RowValues sum_;
};

}  // namespace fa::device
