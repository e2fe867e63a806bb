// SPDX-License-Identifier: BSD-3-Clause
// Tests of masks, of the softmax over tiles of keys, and of row statistics on their way out.
// Included by CUDA sources only.
#pragma once

#include <cmath>
#include <string>

#include "device/epilogue.cuh"
#include "device/mask.cuh"
#include "device/softmax.cuh"
#include "device/warp_grid.cuh"
#include "tests/support/cuda_blocks.h"

namespace fa::test {

template <typename Grid>
__global__ void mask_kernel(WindowMask window, int first_query, int first_key, float* g_out,
                            int stride) {
  typename Grid::Sum r_scores;
  r_scores.transform([](float, int, int, int) { return 1.0f; });
  device::keep_visible(r_scores, window, first_query + Grid::row(), first_key + Grid::col(),
                       -INFINITY);
  dump(r_scores, g_out, stride, Grid::row(), Grid::col());
}

// What queries past the end see does not matter, but keys past the end are seen by none.
template <int kRows, int kCols, int kWarps>
void test_mask_of(const WindowMask& window, int first_query, int first_key) {
  Managed<float> out(kRows * kCols, kUntouched);
  run<mask_kernel<device::WarpGrid<kRows, kCols, kWarps>>>(1, 32 * kWarps, 0, window, first_query,
                                                           first_key, out.data, kCols);
  expect(
      concat("keep_visible, ", kWarps, " warps, ", window.seqlen_q(), " queries from ", first_query,
             ", ", window.seqlen_k(), " keys from ", first_key),
      min(kRows, window.seqlen_q() - first_query), kCols, 0,
      [&](int r, int c) { return out[r * kCols + c]; },
      [&](int r, int c) {
        return window.allows(first_query + r, first_key + c) ? 1.0 : -INFINITY;
      });
}

inline void test_mask(const WindowMask& window, int first_query, int first_key) {
  test_mask_of<32, 64, 1>(window, first_query, first_key);
  test_mask_of<64, 96, 4>(window, first_query, first_key);  // warps take turns
}

inline void test_masks() {
  test_mask({80, 115, 20, 9}, 32, 64);
  test_mask({80, 115, 20, 9}, 64, 64);  // ends of both
  test_mask({80, 115, -1, 0}, 0, 0);
  test_mask({80, 115, -1, 0}, 0, 64);  // most see nothing
  test_mask({115, 80, -1, 0}, 32, 0);  // starts with queries that see nothing
  test_mask({115, 80, -1, 0}, 64, 64);
  test_mask({115, 80, 0, 0}, 64, 0);
  test_mask({50, 50, -1, -1}, 32, 0);  // only the end of the keys
  test_mask({50, 50, 3, -1}, 0, 0);
}

inline constexpr int kTiles = 4;  // of keys
using Scores = device::Accumulator<32, 64>;

// What OnlineSoftmax gives for tiles of raw scores, and the sum of the probabilities of a row.
struct SoftmaxResults {
  Managed<float> lse{Scores::kRows, kUntouched};
  Managed<float> sum{Scores::kRows, kUntouched};
  Managed<float> rescale{kTiles * Scores::kRows, kUntouched};
  Managed<int> raised{kTiles};
};

static __global__ void softmax_kernel(const float* g_scores, float scale, int rows, float* g_lse,
                                      float* g_sum, float* g_rescale, int* g_raised) {
  device::OnlineSoftmax<Scores::kRowsPerThread> softmax(scale);
  Scores::RowValues r_sum = {};  // of p, rescaled as out is
  for (int tile = 0; tile < kTiles; ++tile) {
    Scores r_scores;
    r_scores.transform([&](float, int row, int block, int i) {
      return g_scores[(tile * Scores::kRows + Scores::row(row)) * Scores::kCols +
                      Scores::col(block, i)];
    });
    Scores::RowValues largest;
    Scores::RowValues rescale;
    softmax.largest(r_scores, largest);
    const bool raises = __any_sync(~0u, softmax.raises(largest));
    const bool raised = __any_sync(~0u, softmax.raise(largest, rescale));
    softmax.exponentiate(r_scores);
    if (ptx::lane_index() == 0) {
      g_raised[tile] = raises == raised ? raised : -1;  // raises() foretells raise()
    }
    device::store_row_values<Scores>(rescale, g_rescale + tile * Scores::kRows, 0, rows);
    for (int row = 0; row < Scores::kRowsPerThread; ++row) {
      r_sum[row] *= raised ? rescale[row] : 1.0f;
    }
    r_scores.transform([&](float p, int row, int, int) {
      r_sum[row] += p;
      return p;
    });
  }
  Scores::RowValues total;
  Scores::RowValues lse;
  Scores::RowValues normalizer;
  softmax.sums(total);
  softmax.finalize(total, lse, normalizer);
  device::store_row_values<Scores>(lse, g_lse, 0, rows);
  for (int row = 0; row < Scores::kRowsPerThread; ++row) {
    r_sum[row] = device::row_sum(r_sum[row]) * normalizer[row];
  }
  device::store_row_values<Scores>(r_sum, g_sum, 0, rows);
}

// Rows `sees_nothing` and `sees_nan` are special; -1: there is none.
inline void test_softmax(const char* name, Managed<float>& scores, float scale, int sees_nothing,
                         int sees_nan, SoftmaxResults& results) {
  constexpr int kRows = Scores::kRows - 3;  // the rest is not written
  run<softmax_kernel>(1, 32, 0, scores.data, scale, kRows, results.lse.data, results.sum.data,
                      results.rescale.data, results.raised.data);
  const auto expected = [&](int row) {
    double total = 0;
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int key = 0; key < Scores::kCols; ++key) {
        total +=
            std::exp(double{scale} * scores[(tile * Scores::kRows + row) * Scores::kCols + key]);
      }
    }
    return std::log(total);
  };
  const auto nan_to_zero = [](double x) { return std::isnan(x) ? 0.0 : x; };
  expect(
      concat("OnlineSoftmax, store_row_values, lse, ", name), Scores::kRows, 1, 1e-4,
      [&](int r, int) { return r == sees_nan ? std::isnan(results.lse[r]) : results.lse[r]; },
      [&](int r, int) { return r >= kRows      ? kUntouched
                               : r == sees_nan ? 1.0
                                               : expected(r); });
  expect(
      concat("OnlineSoftmax, rows sum to one, ", name), kRows, 1, 1e-5,
      [&](int r, int) { return nan_to_zero(results.sum[r]); },
      [&](int r, int) { return r == sees_nothing || r == sees_nan ? 0.0 : 1.0; });
}

inline void test_softmax_of_any_scores() {
  Managed<float> scores(kTiles * Scores::kRows * Scores::kCols);
  constexpr int kSeesNothing = 19;
  constexpr int kSeesNan = 25;
  for (size_t i = 0; i < scores.size; ++i) {
    const int row = static_cast<int>(i) / Scores::kCols % Scores::kRows;
    const int tile = static_cast<int>(i) / (Scores::kRows * Scores::kCols);
    const bool masked = row == kSeesNothing || (row == 5 && tile == 0) || (row == 6 && tile > 0);
    scores[i] = masked ? -INFINITY : static_cast<float>((i * 37 + i / 64 * 11) % 401) - 200.0f;
  }
  scores[(2 * Scores::kRows + kSeesNan) * Scores::kCols + 9] = NAN;
  SoftmaxResults results;
  test_softmax("any scores", scores, 0.25f, kSeesNothing, kSeesNan, results);
}

// The base of a row is raised by scores more than eight octaves above it, and by no others.
inline void test_softmax_slack() {
  constexpr int kRaised = 11;  // the row that tile 2 raises
  const auto largest = [](int tile, int row) {
    const float first = 10.0f + row;
    return tile == 1 ? first + 7.5f : tile == 2 && row == kRaised ? first + 8.5f : first;
  };
  Managed<float> scores(kTiles * Scores::kRows * Scores::kCols);
  for (size_t i = 0; i < scores.size; ++i) {
    const int row = static_cast<int>(i) / Scores::kCols % Scores::kRows;
    const int tile = static_cast<int>(i) / (Scores::kRows * Scores::kCols);
    scores[i] = largest(tile, row) - static_cast<float>(i * 5 % Scores::kCols);
  }
  SoftmaxResults results;
  test_softmax("slack", scores, kLn2, -1, -1, results);  // a score is an octave
  expect(
      "OnlineSoftmax, raises", kTiles, 1, 0, [&](int tile, int) { return results.raised[tile]; },
      [](int tile, int) { return tile == 0 || tile == 2; });
  expect(
      "OnlineSoftmax, rescale", kTiles, Scores::kRows - 3, 1e-6,
      [&](int tile, int row) { return results.rescale[tile * Scores::kRows + row]; },
      [](int tile, int row) {
        return tile == 0 ? 0.0 : tile == 2 && row == kRaised ? std::exp2(-8.5) : 1.0;
      });
}

}  // namespace fa::test
