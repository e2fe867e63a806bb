// SPDX-License-Identifier: BSD-3-Clause
// The terms of common/score_terms.h in a warp's tile of scores and at the end of its rows, against
// the host. Prints a line per check; returns 0 if all hold, 1 if one does not, 77 without a GPU.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/score_terms.h"
#include "device/dropout.cuh"
#include "device/score_rules.cuh"
#include "device/softmax.cuh"
#include "device/speculative_softmax.cuh"
#include "device/warp_grid.cuh"
#include "tests/support/cuda_blocks.h"

namespace {

using namespace fa;
using namespace fa::test;

constexpr int kBatch = 1;
constexpr int kHead = 2;
constexpr int kNumHeads = 3;

// What is dropped of ones, once and once more.
template <typename Grid>
__global__ void drop_kernel(const __grid_constant__ Dropout dropout, int first_query, int first_key,
                            float* g_dropped, float* g_again) {
  const auto ones = [](float, int, int, int) { return 1.0f; };
  const DropoutOfHead of_head(dropout, kBatch, kHead, kNumHeads);
  const int query = first_query + Grid::row();
  const int key = first_key + Grid::col();
  constexpr int kStride = Grid::kCols * Grid::kColWarps;
  typename Grid::Sum r_p;
  r_p.transform(ones);
  device::drop(r_p, of_head, query, key);
  dump(r_p, g_dropped, kStride, Grid::row(), Grid::col());
  device::Kept<typename Grid::Sum> kept;
  kept.find(of_head, query, key);
  r_p.transform(ones);
  kept.drop(r_p);
  dump(r_p, g_again, kStride, Grid::row(), Grid::col());
}

template <int kRows, int kCols, int kWarps>
void test_dropout(int first_query, int first_key) {
  Managed<int64_t> rng_state(2);
  rng_state[0] = 0x123456789abcdef;
  rng_state[1] = -5;
  for (const double dropout_p : {0.0, 0.4, 1.0}) {
    const Dropout dropout = Dropout::of(dropout_p, rng_state.data);
    const DropoutOfHead of_head(dropout, kBatch, kHead, kNumHeads);
    Managed<float> dropped(kRows * kCols, kUntouched);
    Managed<float> again(kRows * kCols, kUntouched);
    run<drop_kernel<device::WarpGrid<kRows, kCols, kWarps>>>(
        1, 32 * kWarps, 0, dropout, first_query, first_key, dropped.data, again.data);
    for (Managed<float>* actual : {&dropped, &again}) {
      expect(
          concat("dropout of ", dropout_p, actual == &again ? ", once more, " : ", ",
                 shape_name(kRows, kCols), " by ", kWarps, " warps, queries from ", first_query,
                 ", keys from ", first_key),
          kRows, kCols, 0, [&](int r, int c) { return (*actual)[r * kCols + c]; },
          [&](int r, int c) { return of_head.keeps(first_query + r, first_key + c) ? 1 : 0; });
    }
  }
}

__global__ void tanh_kernel(const float* g_x, float* g_tanh, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += blockDim.x) {
    g_tanh[i] = device::tanh_approx(g_x[i]);
  }
}

void test_tanh() {
  std::vector<float> xs = {0.0f, -0.0f, INFINITY, -INFINITY, 1e-38f, -1e-20f, 0.25f, -0.25f, 3e38f};
  for (float x = 1e-6f; x < 50; x *= 1.003f) {
    xs.push_back(x);
    xs.push_back(-x);
  }
  const int count = static_cast<int>(xs.size());
  Managed<float> x(count);
  Managed<float> tanh(count);
  std::copy(xs.begin(), xs.end(), x.data);
  run<tanh_kernel>(1, 256, 0, x.data, tanh.data, count);
  expect(
      "tanh, relative error", count, 1, 2e-6,
      [&](int i, int) {
        const double expected = std::tanh(double{x[i]});
        return expected == 0 ? tanh[i] : std::abs(tanh[i] / expected - 1);
      },
      [](int, int) { return 0; });
}

using Scores = device::Accumulator<32, 32, 32, 64>;

// Finished scores of one warp, and the tanh that is told of each.
__global__ void finish_kernel(const __grid_constant__ ScoreRules rules, WindowMask window,
                              float scale, int first_query, int first_key, float* g_scores,
                              float* g_tanh) {
  Scores r_scores;
  r_scores.transform([](float, int row, int block, int i) {
    return static_cast<float>(Scores::row(row) - Scores::col(block, i));
  });
  Scores r_tanh;
  r_tanh.clear();
  const device::HeadRules of_head(rules, PrefixWindow(rules, window, kBatch), kBatch, kHead);
  of_head.finish_scores(
      r_scores, scale, first_query, first_key,
      [&](float tanh, int row, int block, int i) { r_tanh.r[row / 2][block][i] = tanh; });
  dump(r_scores, g_scores, 128, 0, 0);
  dump(r_tanh, g_tanh, 128, 0, 0);
}

void test_finished_scores(double softcap, bool has_slopes, float scale) {
  Managed<float> slopes(2 * kNumHeads, 0.0f);
  slopes[kBatch * kNumHeads + kHead] = 0.3f;
  ScoreRules rules;
  rules.terms.softcap = softcap;
  if (has_slopes) {
    rules.terms.alibi = {slopes.data, kNumHeads, 1};
  }
  const WindowMask window(150, 200, -1, -1);
  constexpr int kFirstQuery = 64;
  constexpr int kFirstKey = 80;
  Managed<float> scores(64 * 128, kUntouched);
  Managed<float> tanh(64 * 128, kUntouched);
  run<finish_kernel>(1, 32, 0, rules, window, scale, kFirstQuery, kFirstKey, scores.data,
                     tanh.data);
  const auto product = [&](int r, int c) { return scale * double{static_cast<float>(r - c)}; };
  const std::string name =
      concat("softcap ", softcap, has_slopes ? ", slopes" : "", ", scale ", scale);
  expect(
      "scores, " + name, 64, 128, 1e-4, [&](int r, int c) { return scores[r * 128 + c]; },
      [&](int r, int c) {
        if (scores[r * 128 + c] == kUntouched) {
          return double{kUntouched};  // of another warp
        }
        const double x = product(r, c);
        const double slope = has_slopes ? 0.3f : 0;
        return (softcap == 0 ? x : softcap * std::tanh(x / softcap)) +
               slope * alibi_distance(window, kFirstQuery + r, kFirstKey + c);
      });
  if (softcap != 0) {
    expect(
        "tanh, " + name, 64, 128, 1e-6, [&](int r, int c) { return tanh[r * 128 + c]; },
        [&](int r, int c) {
          return tanh[r * 128 + c] == kUntouched ? double{kUntouched}
                                                 : std::tanh(product(r, c) / softcap);
        });
  }
}

__global__ void sink_kernel(const float* g_sums, const float* g_max, const float* g_sinks,
                            float* g_lse, float* g_normalizer, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += blockDim.x) {
    device::finalize_with_sink(g_sums[i], g_max[i], g_sinks[i], g_lse[i], g_normalizer[i]);
  }
}

// Whatever is larger, the scores or the sink.
void test_sinks() {
  struct Row {
    float sum, max, sink;
  };
  std::vector<Row> rows;
  for (const float max : {-1e30f, -300.0f, -1.0f, 0.0f, 2.0f, 500.0f, 1e30f, -INFINITY}) {
    for (const float sum : {1e-3f, 1.0f, 200.0f}) {
      for (const float sink : {-INFINITY, -1e30f, -200.0f, 0.0f, 3.0f, 300.0f, 1e30f}) {
        rows.push_back({max == -INFINITY ? 0.0f : sum, max, sink});
      }
    }
  }
  const int count = static_cast<int>(rows.size());
  Managed<float> sums(count);
  Managed<float> max(count);
  Managed<float> sinks(count);
  Managed<float> lse(count, kUntouched);
  Managed<float> normalizer(count, kUntouched);
  for (int i = 0; i < count; ++i) {
    sums[i] = rows[i].sum;
    max[i] = rows[i].max;
    sinks[i] = rows[i].sink;
  }
  run<sink_kernel>(1, 128, 0, sums.data, max.data, sinks.data, lse.data, normalizer.data, count);
  const auto expected = [&](int i) {
    const double largest = std::max(max[i], sinks[i]);
    return largest == -INFINITY ? largest
                                : largest + std::log(sums[i] * std::exp(max[i] - largest) +
                                                     std::exp(sinks[i] - largest));
  };
  expect(
      "sinks, lse", count, 1, 1e-6,
      [&](int i, int) {
        const double difference = lse[i] == expected(i) ? 0.0 : lse[i] - expected(i);
        return difference / std::max(1.0, std::abs(expected(i)));
      },
      [](int, int) { return 0; });
  expect(
      "sinks, normalizer", count, 1, 1e-5,
      [&](int i, int) { return normalizer[i] * std::max(sums[i], 1e-3f); },
      [&](int i, int) {
        const double largest = std::max(max[i], sinks[i]);
        const double share = sums[i] == 0 ? 0.0 : std::exp(max[i] - largest);
        const double sum = sums[i] * share + std::exp(sinks[i] - largest);
        return share == 0 ? 0.0 : share / sum * std::max(sums[i], 1e-3f);
      });
}

// Rows of scores by both softmaxes, with a sink: lse, and the sums of normalized probabilities; of
// the speculative one, whose sums are its own, the normalizer in their place.
using Rows = device::Accumulator<16, 64>;
enum Result { kOnline, kSpeculative, kResults };

__global__ void softmax_kernel(const float* g_scores, float scale, float sink, float* g_lse,
                               float* g_sums) {
  Rows r_scores;
  r_scores.transform([&](float, int row, int block, int i) {
    return g_scores[Rows::row(row) * Rows::kCols + Rows::col(block, i)];
  });
  Rows::RowValues lse[kResults];
  Rows::RowValues sums[kResults];
  Rows::RowValues normalizer;

  device::SpeculativeSoftmax<2> speculative(scale);
  device::OperandA<__nv_bfloat16, 16, 64> r_p;
  speculative.begin(r_scores, r_p);
  speculative.finalize(lse[kSpeculative], sums[kSpeculative], &sink);

  device::OnlineSoftmax<2> online(scale);
  Rows::RowValues largest;
  Rows::RowValues rescale;
  online.largest(r_scores, largest);
  online.raise(largest, rescale);
  online.exponentiate(r_scores);
  online.sums(sums[kOnline]);
  online.finalize(sums[kOnline], lse[kOnline], normalizer, &sink);
  for (int row = 0; row < 2; ++row) {
    sums[kOnline][row] *= normalizer[row];
    for (int result = 0; result < kResults; ++result) {
      g_lse[result * Rows::kRows + Rows::row(row)] = lse[result][row];
      g_sums[result * Rows::kRows + Rows::row(row)] = sums[result][row];
    }
  }
}

void test_softmax_with_sink(float sink) {
  constexpr float kScale = 0.5f;
  constexpr int kSeesNothing = 5;
  Managed<float> scores(Rows::kRows * Rows::kCols);
  for (int i = 0; i < Rows::kRows * Rows::kCols; ++i) {
    const int row = i / Rows::kCols;
    scores[i] = row == kSeesNothing ? -INFINITY : static_cast<float>(i * 37 % 101 + 8 * row - 80);
  }
  Managed<float> lse(kResults * Rows::kRows, kUntouched);
  Managed<float> sums(kResults * Rows::kRows, kUntouched);
  run<softmax_kernel>(1, 32, 0, scores.data, kScale, sink, lse.data, sums.data);
  const auto sum_of_scores = [&](int row) {
    double sum = 0;
    for (int col = 0; col < Rows::kCols; ++col) {
      sum += std::exp(double{kScale} * scores[row * Rows::kCols + col]);
    }
    return sum;
  };
  expect(
      concat("lse with a sink of ", sink), kResults, Rows::kRows, 1e-4,
      [&](int result, int row) { return lse[result * Rows::kRows + row]; },
      [&](int, int row) { return std::log(sum_of_scores(row) + std::exp(double{sink})); });
  expect(
      concat("what is left to probabilities by a sink of ", sink), 1, Rows::kRows, 1e-5,
      [&](int, int row) { return sums[row]; },
      [&](int, int row) {
        const double sum = sum_of_scores(row);
        return sum == 0 ? 0 : sum / (sum + std::exp(double{sink}));
      });
}

void test_all() {
  for (const int first_query : {0, 16, 4096}) {
    for (const int first_key : {0, 32, 1024}) {
      test_dropout<16, 64, 1>(first_query, first_key);
      test_dropout<64, 32, 4>(first_query, first_key);
      test_dropout<32, 32, 4>(first_query, first_key);
      test_dropout<64, 64, 4>(first_query, first_key);
      test_dropout<64, 128, 8>(first_query, first_key);
      test_dropout<16, 16, 1>(first_query, first_key + 16);
    }
  }
  test_tanh();
  for (const float scale : {0.125f, -0.5f, 0.0f}) {
    for (const double softcap : {0.0, 2e-38, 1.5, 1e6}) {
      test_finished_scores(softcap, false, scale);
      test_finished_scores(softcap, true, scale);
    }
  }
  test_sinks();
  for (const float sink : {-INFINITY, -30.0f, 0.0f, 20.0f, 60.0f}) {
    test_softmax_with_sink(sink);
  }
}

}  // namespace

int main() { return run_tests(test_all); }
