// SPDX-License-Identifier: BSD-3-Clause
// What Hopper's kernels do under rules for scores beside their products: which pairs are seen, how
// a bias comes to its scores, and how tiles of its gradient are transposed; each against the host.
// None of it needs a GPU of compute capability 9.0. Prints a line per check; returns 0 if all hold,
// 1 if one does not, 77 without a GPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <random>
#include <string>

#include "common/check.h"
#include "ptx/movmatrix.cuh"
#include "sm90/score_bias.cuh"
#include "sm90/seen_pairs.cuh"
#include "sm90/seen_pairs_of_lane.cuh"
#include "support/pair_bits.h"
#include "tests/support/cuda_blocks.h"
#include "tests/support/cuda_managed_rules.h"

namespace {

using namespace fa;
using namespace fa::test;

std::mt19937 g_random(0);

// What one warp finds out for a warpgroup of Hopper's general forward, and four warps read: 1 where
// a pair is seen.
template <int kKeys>
__global__ void seen_pairs_kernel(const __grid_constant__ ScoreRules rules, WindowMask window,
                                  int first_query, int first_key, const uint32_t* g_bits,
                                  float* g_scores) {
  __shared__ sm90::SeenPairs<kKeys> s_pairs;
  sm90::SeenPairsOfWarpgroup<kKeys> seen;
  seen.find([&](int half) {
    sm90::SeenPairsOfWarp<kKeys> found(PrefixWindow(rules, window, 1),
                                       first_query + half * ptx::kWarpSize, window.seqlen_q(),
                                       first_key);
    found.keep_masks(rules, 1, 2);
    return found;
  });
  const KeepMask& mask = rules.masks[0];
  if (PairBits::is_of(mask)) {
    sm90::SeenPairsOfWarpgroup<kKeys> of_mask;
    if (g_bits != nullptr) {
      of_mask.load(g_bits);
    } else {
      of_mask.load(mask, mask.of_head<const uint8_t>(1, 2) + mask.offset(first_query, first_key),
                   window.seqlen_q() - first_query, window.seqlen_k() - first_key);
    }
    seen.keep(of_mask);
  }
  if (rules.document_ids != nullptr) {
    const int32_t* g_ids = rules.document_ids + rules.document_stride;
    sm90::DocumentsOfWarpgroup<kKeys> documents;
    documents.load_queries(g_ids, first_query, window.seqlen_q());
    documents.load_keys(g_ids, first_key, window.seqlen_k());
    seen.keep(documents);
  }
  seen.store(s_pairs);
  __syncwarp();
  for (int row = 0; row < sm90::SeenPairs<kKeys>::kRows; row += device::kBlockRows) {
    device::Accumulator<device::kBlockRows, kKeys> r_scores;
    r_scores.transform([](float, int, int, int) { return 1.0f; });
    typename sm90::SeenPairs<kKeys>::OfThread r_seen;
    s_pairs.load(r_seen, row);
    s_pairs.keep_seen(r_scores, r_seen);
    dump(r_scores, g_scores, kKeys, row, 0);
  }
}

template <int kKeys>
void test_seen_pairs(const RuleCase& test, bool has_bits) {
  constexpr int kQueries = 64;
  const Rules rules(test, g_random);
  const ScoreRules view = rules.view();
  const Shape& shape = test.shape;
  const WindowMask window(shape.seqlen_q, shape.seqlen_k, test.left, test.right);
  const Visibility visibility(view, window, 1, 2);
  PairBits bits = has_bits ? PairBits::of(view, shape.batch, shape.num_heads, shape.seqlen_q,
                                          shape.seqlen_k, kQueries, kKeys)
                           : PairBits{};
  Managed<uint32_t> words(bits.count + 1);
  if (bits.count > 0) {
    bits.words = words.data;
    const WindowMask all(shape.seqlen_q, shape.seqlen_k, -1, -1);
    support::launch_pair_bits(
        {view.masks[0], bits, shape, all, kQueries, kKeys, support::BitRows::kQueries}, nullptr);
  }
  int wrong = 0;
  int seen = 0;
  int count = 0;
  for (int i = 0; i * kQueries < shape.seqlen_q; ++i) {
    for (int j = 0; j * kKeys < shape.seqlen_k; ++j) {
      Managed<float> scores(kQueries * kKeys, kUntouched);
      run<seen_pairs_kernel<kKeys>>(1, 32, 0, view, window, i * kQueries, j * kKeys,
                                    bits.count > 0 ? bits.tile(1, 2, i, j) : nullptr, scores.data);
      for (int row = 0; row < kQueries; ++row) {
        for (int col = 0; col < kKeys; ++col, ++count) {
          const int query = i * kQueries + row;
          const int key = j * kKeys + col;
          const bool sees =
              query < shape.seqlen_q && key < shape.seqlen_k && visibility.allows(query, key);
          wrong += scores[row * kKeys + col] != (sees ? 1.0f : -INFINITY);
          seen += sees;
        }
      }
    }
  }
  report(concat("pairs seen, ", test.name, has_bits ? "" : " of bytes", ", of ", kKeys,
                " keys: ", seen),
         wrong, count);
}

const RuleCase kSeenCases[] = {
    {"window", {2, 3, 1, 150, 300, 64, 64}, {}, 50, 10},
    {"window and prefix", {2, 3, 1, 300, 150, 64, 64}, {.prefix_lens = {0, 70}}, 20, 3},
    {"documents", {2, 3, 1, 300, 300, 64, 64}, {.documents = 2}},
    {"many documents, causal", {2, 3, 1, 300, 300, 64, 64}, {.documents = 40}, -1, 0},
    {"a mask", {2, 3, 1, 150, 300, 64, 64}, {.masks = {{}}}},
    {"a mask, queries last", {2, 3, 1, 150, 301, 64, 64}, {.masks = {{.queries_last = true}}}},
    {"a mask of rows that overlap", {2, 3, 1, 150, 300, 64, 64}, {.masks = {{.step = 1}}}},
    {"a mask of queries", {2, 3, 1, 150, 300, 64, 64}, {.masks = {{.over = {.key = true}}}}},
    {"a mask of keys", {2, 3, 1, 150, 300, 64, 64}, {.masks = {{.over = {.query = true}}}}},
    {"a mask of all",
     {2, 3, 1, 90, 90, 64, 64},
     {.masks = {{.over = {.query = true, .key = true}}}}},
    {"everything",
     {2, 3, 1, 300, 300, 64, 64},
     {.masks = {{}, {.over = {.head = true, .query = true}}},
      .documents = 3,
      .prefix_lens = {0, 60}},
     80,
     10},
};

// What lanes find out for themselves, of scores (queries, keys) or transposed: of all rows of a
// tile, 16 at a time, and of some of its kCols columns at a time; by all rules at once or in two
// steps. g_words: of the tile, or null.
template <typename Scores, bool kTransposed, int kCols, bool kInSteps>
__global__ void seen_by_lanes_kernel(const __grid_constant__ ScoreRules rules, WindowMask window,
                                     int first_query, int first_key, int rows,
                                     const uint32_t* g_words, float* g_scores) {
  using Seen = sm90::SeenPairsOfLane<Scores, kTransposed, kCols>;
  const PrefixWindow prefix_window(rules, window, 1);
  for (int row = 0; row < rows; row += Scores::kRows) {
    for (int col = 0; col < kCols; col += Scores::kCols) {
      const sm90::ScoreOrigin origin = {1, 2, first_query + (kTransposed ? col : row),
                                        first_key + (kTransposed ? row : col)};
      const uint32_t* words = g_words == nullptr ? nullptr : g_words + row * Seen::kWords;
      Seen seen;
      if constexpr (kInSteps) {
        seen.template find<sm90::SeenBy::kWindowAndWords>(rules, prefix_window, origin, words, col);
        seen.template find<sm90::SeenBy::kData>(rules, prefix_window, origin, words, col);
      } else {
        seen.find(rules, prefix_window, origin, words, col);
      }
      Scores r_scores;
      r_scores.transform([](float, int, int, int) { return 1.0f; });
      seen.keep(r_scores);
      dump(r_scores, g_scores, kCols, row, col);
    }
  }
}

template <typename Scores, bool kTransposed, int kCols, bool kInSteps = false>
void test_seen_by_lanes(const RuleCase& test, bool has_bits) {
  constexpr int kRows = kTransposed ? 128 : 64;
  constexpr int kQueries = kTransposed ? kCols : kRows;
  constexpr int kKeys = kTransposed ? kRows : kCols;
  const Rules rules(test, g_random);
  const ScoreRules view = rules.view();
  const Shape& shape = test.shape;
  const WindowMask window(shape.seqlen_q, shape.seqlen_k, test.left, test.right);
  const Visibility visibility(view, window, 1, 2);
  PairBits bits = has_bits ? PairBits::of(view, shape.batch, shape.num_heads, shape.seqlen_q,
                                          shape.seqlen_k, kQueries, kKeys)
                           : PairBits{};
  Managed<uint32_t> words(bits.count + 1);
  if (bits.count > 0) {
    bits.words = words.data;
    const WindowMask all(shape.seqlen_q, shape.seqlen_k, -1, -1);
    support::launch_pair_bits({view.masks[0], bits, shape, all, kQueries, kKeys,
                               kTransposed ? support::BitRows::kKeys : support::BitRows::kQueries},
                              nullptr);
  }
  int wrong = 0;
  int seen = 0;
  int count = 0;
  for (int i = 0; i * kQueries < shape.seqlen_q; ++i) {
    for (int j = 0; j * kKeys < shape.seqlen_k; ++j) {
      Managed<float> scores(kQueries * kKeys, kUntouched);
      run<seen_by_lanes_kernel<Scores, kTransposed, kCols, kInSteps>>(
          1, 32, 0, view, window, i * kQueries, j * kKeys, kRows,
          bits.count > 0 ? bits.tile(1, 2, i, j) : nullptr, scores.data);
      for (int row = 0; row < kRows; ++row) {
        for (int col = 0; col < kCols; ++col, ++count) {
          const int query = i * kQueries + (kTransposed ? col : row);
          const int key = j * kKeys + (kTransposed ? row : col);
          const bool sees =
              query < shape.seqlen_q && key < shape.seqlen_k && visibility.allows(query, key);
          wrong += scores[row * kCols + col] != (sees ? 1.0f : 0.0f);
          seen += sees;
        }
      }
    }
  }
  report(
      concat("seen by lanes, ", test.name, has_bits ? "" : " of bytes", ", ", Scores::kCols, " of ",
             kCols, kTransposed ? " queries" : " keys", kInSteps ? ", in steps: " : ": ", seen),
      wrong, count);
}

// --- Biases ---

// scale * score + bias of a warp's scores, read by each lane; of other warps' scores untouched.
template <typename Scores, bool kTransposed, bool kByHalves>
__global__ void bias_kernel(const __grid_constant__ ScoreRules rules, int first_query,
                            int end_query, int first_key, int end_key, float* g_scores) {
  __shared__ float s_floats[4 * Scores::kColBlocks * ptx::kWarpSize];
  float* s_lane = s_floats + ptx::lane_index();
  Scores r_scores;
  r_scores.transform([](float, int row, int block, int i) {
    return static_cast<float>(Scores::row(row) - Scores::col(block, i));
  });
  const sm90::BiasPart<kTransposed> bias = {rules,     1,         2,      first_query,
                                            end_query, first_key, end_key};
  if constexpr (kByHalves) {
    sm90::add_bias(r_scores, 0.5f, s_lane, bias);
  } else {
    bias.template load_of_lane<Scores>(s_lane);
    sm90::add_bias_of_lane<Scores::kColBlocks>(r_scores, 0.5f, s_lane);
  }
  dump(r_scores, g_scores, Scores::kCols, 0, 0);
}

struct BiasLayout {
  const char* name;
  ScoreTensor strides;  // of (2, 3, queries, keys)
};

template <typename Element, typename Scores, bool kTransposed, bool kByHalves>
void test_bias(const std::string& name, Dtype dtype) {
  constexpr int kQueries = 150, kKeys = 170;
  constexpr int64_t kMatrix = int64_t{kQueries} * kKeys;
  const BiasLayout layouts[] = {
      {"rows of keys", {nullptr, 3 * kMatrix, kMatrix, kKeys, 1}},
      {"rows of queries", {nullptr, 3 * kMatrix, kMatrix, 1, kQueries}},
      {"rows that overlap", {nullptr, 3 * kMatrix, kMatrix, 1, 1}},
      {"one for each key", {nullptr, 3 * kKeys, kKeys, 0, 1}},
      {"one for each query", {nullptr, 0, kQueries, 1, 0}},
      {"one", {}},
  };
  Managed<Element> memory(6 * kMatrix);
  fill(memory, 3);
  int wrong = 0;
  int count = 0;
  for (const BiasLayout& layout : layouts) {
    ScoreRules rules;
    rules.bias = layout.strides;
    rules.bias.data = memory.data;
    rules.bias_dtype = dtype;
    for (const int first_query : {0, 48, 144}) {
      for (const int first_key : {0, 64, 160}) {
        Managed<float> scores(Scores::kRows * Scores::kCols, kUntouched);
        run<bias_kernel<Scores, kTransposed, kByHalves>>(1, 32, 0, rules, first_query, kQueries,
                                                         first_key, kKeys, scores.data);
        for (int row = 0; row < Scores::kRows; ++row) {
          for (int col = 0; col < Scores::kCols; ++col, ++count) {
            const int query = min(first_query + (kTransposed ? col : row), kQueries - 1);
            const int key = min(first_key + (kTransposed ? row : col), kKeys - 1);
            const auto* g_head = rules.bias.of_head<const Element>(1, 2);
            const float expected = 0.5f * static_cast<float>(row - col) +
                                   static_cast<float>(g_head[rules.bias.offset(query, key)]);
            wrong += scores[row * Scores::kCols + col] != expected;
          }
        }
      }
    }
  }
  report(concat("bias, ", name, ", ", name_of(dtype)), wrong, count);
}

template <typename Element>
void test_biases(Dtype dtype) {
  test_bias<Element, device::Accumulator<16, 64>, false, false>("16 queries", dtype);
  test_bias<Element, device::Accumulator<16, 128>, false, true>("16 queries by halves", dtype);
  test_bias<Element, device::Accumulator<16, 64>, true, false>("16 keys", dtype);
  test_bias<Element, device::Accumulator<16, 128>, true, false>("16 keys, more queries", dtype);
}

// --- Transposed matrices ---

__global__ void transpose_kernel(const uint32_t* g_pairs, uint32_t* g_transposed) {
  g_transposed[threadIdx.x] = ptx::transpose_8x8(g_pairs[threadIdx.x]);
}

void test_transpose() {
  constexpr int kSize = 8;
  Managed<uint32_t> pairs(32);
  Managed<uint32_t> transposed(32);
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t first = lane / 4 * kSize + lane % 4 * 2;  // the element's number
    pairs[lane] = first | (first + 1) << 16;
  }
  run<transpose_kernel>(1, 32, 0, pairs.data, transposed.data);
  const auto element = [&](int row, int col) {
    return transposed[row * 4 + col / 2] >> (16 * (col % 2)) & 0xFFFF;
  };
  expect("8x8 transposed", kSize, kSize, 0, element,
         [](int row, int col) { return col * kSize + row; });
}

}  // namespace

int main() {
  return run_tests([] {
    for (const RuleCase& test : kSeenCases) {
      for (const bool has_bits : {false, true}) {
        test_seen_pairs<64>(test, has_bits);
        test_seen_pairs<128>(test, has_bits);
        test_seen_by_lanes<device::Accumulator<16, 64>, true, 64>(test, has_bits);
        test_seen_by_lanes<device::Accumulator<16, 128>, true, 128>(test, has_bits);
        test_seen_by_lanes<device::Accumulator<16, 64>, true, 128>(test, has_bits);
        test_seen_by_lanes<device::Accumulator<16, 64>, false, 64>(test, has_bits);
        test_seen_by_lanes<device::Accumulator<16, 64>, false, 64, true>(test, has_bits);
      }
    }
    test_biases<float>(Dtype::kFloat32);
    test_biases<__nv_bfloat16>(Dtype::kBFloat16);
    test_biases<__half>(Dtype::kFloat16);
    test_transpose();
  });
}
