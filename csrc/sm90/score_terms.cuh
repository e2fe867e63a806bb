// SPDX-License-Identifier: BSD-3-Clause
// Softcap and ALiBi of common/score_terms.h, for a warp's scores: 16 queries or, transposed, 16
// keys.
#pragma once

#include <cfloat>

#include "common/math.h"
#include "common/params.h"
#include "device/fragment.cuh"

namespace fa::sm90 {

// tanh(x) = 1 - 2 r and its slope 4 r (1 - r), where r = 1 / (1 + e^(2 x)): exact to some 1e-7 and
// right where e^(2 x) is infinite, unlike tanh.approx, whose error of 5e-4 a cap of 50 would make
// 0.025 of a score.
class Softcap {
 public:
  FA_DEVICE Softcap(float softcap, float softmax_scale)
      : exponent_of_product_(  // finite, for 0 * inf is NaN
            fminf(fmaxf(2.0f * kLog2E * softmax_scale / softcap, -FLT_MAX), FLT_MAX)),
        softcap_(softcap) {}

  // r of a product of q and k.
  FA_DEVICE float complement(float product) const {
    return ptx::reciprocal_approx(1.0f + ptx::exp2_approx(product * exponent_of_product_));
  }
  FA_DEVICE float score(float complement) const {
    return fmaf(-2.0f * softcap_, complement, softcap_);
  }

 private:
  float exponent_of_product_;
  float softcap_;
};

// Products become scores.
template <typename Scores>
FA_DEVICE void cap_scores(Scores& r_scores, const Softcap& softcap) {
  r_scores.transform(
      [&](float product, int, int, int) { return softcap.score(softcap.complement(product)); });
}

// The same, and gradients of scores become those of products: but for softmax_scale.
template <typename Scores>
FA_DEVICE void cap_scores(Scores& r_scores, Scores& r_gradients, const Softcap& softcap) {
  r_scores.transform([&](float product, int row, int block, int i) {
    const float complement = softcap.complement(product);
    float& gradient = r_gradients.r[row / 2][block][i];
    gradient *= 4.0f * complement * (1.0f - complement);
    return softcap.score(complement);
  });
}

// Each score becomes scale * score - slope * |distance|. distance: from the warp's first key to the
// key that is aligned with its first query. Mostly all pairs of a tile lie on one side of the
// aligned diagonal, and it takes a second fma.
template <bool kTransposed, typename Scores>
FA_DEVICE void add_alibi(Scores& r_scores, float scale, float slope, int distance) {
  constexpr int kRowSign = kTransposed ? -1 : 1;
  constexpr int kMostOfRows = device::kBlockRows - 1;
  constexpr int kMostOfCols = Scores::kCols - 1;
  const int smallest = distance - (kTransposed ? kMostOfRows : kMostOfCols);
  const int largest = distance + (kTransposed ? kMostOfCols : kMostOfRows);
  const auto distance_of = [&](int row) {
    return static_cast<float>(distance + kRowSign * (Scores::row(row) - Scores::col(0, 0)));
  };
  float first[2];
  if (smallest >= 0 || largest <= 0) {
    const float signed_slope = smallest >= 0 ? -slope : slope;
    const float of_col = -kRowSign * signed_slope;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      first[row] = signed_slope * distance_of(row);
    }
    r_scores.transform([&](float score, int row, int block, int i) {
      const auto col = static_cast<float>(Scores::first_col(block) + i % 2);
      return fmaf(score, scale, fmaf(of_col, col, first[row]));
    });
  } else {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      first[row] = distance_of(row);
    }
    r_scores.transform([&](float score, int row, int block, int i) {
      const auto col = static_cast<float>(Scores::first_col(block) + i % 2);
      return fmaf(score, scale, -slope * fabsf(first[row] - kRowSign * col));
    });
  }
}

}  // namespace fa::sm90
