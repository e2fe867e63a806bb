// SPDX-License-Identifier: BSD-3-Clause
// Softcap and ALiBi of common/score_terms.h, for a warp's scores: 16 queries or, transposed, 16
// keys. As device/score_terms.cuh, but that a product is scaled as it gets its ALiBi.
#pragma once

#include "device/score_terms.cuh"

namespace fa::sm90 {

// Products become scores, and gradients of scores those of products, but for softmax_scale.
template <typename Scores>
FA_DEVICE void cap_scores(Scores& r_scores, Scores& r_gradients, float softmax_scale,
                          float softcap) {
  device::cap_scores(r_scores, softmax_scale, softcap, [&](float tanh, int row, int block, int i) {
    r_gradients.r[row / 2][block][i] *= fmaf(-tanh, tanh, 1.0f);
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
