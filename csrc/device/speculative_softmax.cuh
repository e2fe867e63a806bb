// SPDX-License-Identifier: BSD-3-Clause
// Softmax over keys that arrive tile by tile, without a maximum to wait for. For each row it keeps
// a base m near the largest score so far and l = sum of exp(scale * (score - m)). The probabilities
// of a tile are computed with m as the tiles before have left it, those of the first tile with the
// largest of some scores; their sum, which is needed anyway, then tells whether m was good enough:
//   if a thread's part of it is above kSlack, m is raised to the row's largest score, what was
//   summed before is rescaled, and the tile is computed once more.
// That is rare, so that most tiles need no maximum, no exchange between lanes and no rescaling. Up
// to kSlack, p is larger than 1 without harm: it costs no precision in floating point and cancels
// in the division by l.
//
// A masked score is -inf. A row that has seen only masked scores has no base; its first visible
// score gives it one, however small.
#pragma once

#include <cmath>

#include "common/math.h"
#include "device/score_terms.cuh"

namespace fa::device {

template <int kRowsPerThread>
class SpeculativeSoftmax {
 public:
  using RowValues = float[kRowsPerThread];

  // The scores are multiplied by exp2's share of the scale inside one fma; the scale must be > 0.
  explicit FA_DEVICE SpeculativeSoftmax(float softmax_scale) : scale_log2_(softmax_scale * kLog2E) {
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      base_[row] = 0.0f;
      limit_[row] = kNoBase;
      sum_[row] = 0.0f;
    }
  }

  // The first tile, by whole warps: m begins as the largest of each row's first scores. The others
  // are mostly not so much larger that it must be raised at once.
  template <int kCols, typename Probabilities>
  FA_DEVICE void begin(const Accumulator<kBlockRows, kCols>& r_scores, Probabilities& r_p) {
    static_assert(kCols >= 2 * kBlockCols && kRowsPerThread == 2);
    const float (&r_first)[4] = r_scores.r[0][0];
    const float (&r_second)[4] = r_scores.r[0][1];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float max = row_max(fmaxf(fmaxf(r_first[2 * row], r_first[2 * row + 1]),
                                      fmaxf(r_second[2 * row], r_second[2 * row + 1])));
      const float base = max * scale_log2_;
      if (base != -INFINITY) {
        base_[row] = base;
        limit_[row] = kSlack;
      }
    }
    RowValues rescale;
    next(r_scores, r_p, rescale);
  }

  // A further tile, by whole warps. True if m was raised: what was summed from earlier tiles must
  // then be multiplied by `rescale`.
  template <typename Scores, typename Probabilities>
  FA_DEVICE bool next(const Scores& r_scores, Probabilities& r_p, RowValues& rescale) {
    RowValues sums;
    exponentiate(r_scores, r_p, sums);
    const bool raises = __any_sync(~0u, is_above(sums));
    if (raises) {
      raise(r_scores, sums, rescale);
      exponentiate(r_scores, r_p, sums);
    }
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      sum_[row] += sums[row];
    }
    return raises;
  }

  // lse = log(sum of exp(scale * score)), -inf where no key was seen; `normalizer` is 1 / l, or 0.
  // A sink, where there is one, joins the sum.
  FA_DEVICE void finalize(RowValues& lse, RowValues& normalizer,
                          const float* sink = nullptr) const {
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      const float sum = row_sum(sum_[row]);
      // A NaN is seen, and stays NaN; so does a row whose base is too large for a float.
      const bool sees_a_key = limit_[row] != kNoBase || !(sum == 0.0f);
      if (sink != nullptr && *sink != -INFINITY) {
        const float max = sees_a_key ? base_[row] * kLn2 : -INFINITY;
        finalize_with_sink(sum, max, *sink, lse[row], normalizer[row]);
        continue;
      }
      lse[row] = sees_a_key ? fmaf(base_[row], kLn2, logf(sum)) : -INFINITY;
      normalizer[row] = sees_a_key ? 1.0f / sum : 0.0f;
    }
  }

 private:
  static constexpr float kSlack = 256.0f;
  static constexpr float kNoBase = -1.0f;  // no sum is below: the first that a row sees sets one

  // p = exp2(scale * score - base), rounded to pairs of elements, and the sums of this thread's
  // columns.
  template <typename Element, int kCols>
  FA_DEVICE void exponentiate(const Accumulator<kBlockRows, kCols>& r_scores,
                              OperandA<Element, kBlockRows, kCols>& r_p, RowValues& sums) const {
    static_assert(kRowsPerThread == 2);
#pragma unroll
    for (int block = 0; block < kCols / kBlockCols; ++block) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float (&scores)[4] = r_scores.r[0][block];
        const float left = ptx::exp2_approx(fmaf(scores[2 * row], scale_log2_, -base_[row]));
        const float right = ptx::exp2_approx(fmaf(scores[2 * row + 1], scale_log2_, -base_[row]));
        sums[row] = block == 0 ? left + right : sums[row] + (left + right);
        r_p.r[0][block / 2][block % 2 * 2 + row] = ptx::convert_pair<Element>(left, right);
      }
    }
  }

  // Whether m is too low for a tile with these sums, in any row of this thread.
  FA_DEVICE bool is_above(const RowValues& sums) const {
    bool any = false;
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      any |= sums[row] > limit_[row];
    }
    return any;
  }

  // Raises m to the largest score in the rows whose sums are above their limit in any lane.
  template <typename Scores>
  FA_DEVICE void raise(const Scores& r_scores, const RowValues& sums, RowValues& rescale) {
    RowValues largest;
#pragma unroll
    for (float& max : largest) {
      max = -INFINITY;
    }
    r_scores.for_each([&](float score, int row) { largest[row] = fmaxf(largest[row], score); });
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      const float max = row_max(largest[row]);
      const bool has_base = limit_[row] != kNoBase;
      rescale[row] = 1.0f;
      if (row_max(sums[row]) > limit_[row] && max != -INFINITY) {
        const float base = max * scale_log2_;
        rescale[row] = has_base ? ptx::exp2_approx(base_[row] - base) : 0.0f;
        base_[row] = base;
        limit_[row] = kSlack;
        sum_[row] *= rescale[row];
      }
    }
  }

  float scale_log2_;
  RowValues base_;   // m in units of log2; 0 without a base
  RowValues limit_;  // of the sum of a tile: above it m must be raised
  RowValues sum_;    // of this thread's columns
};

}  // namespace fa::device
