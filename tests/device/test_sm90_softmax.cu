// SPDX-License-Identifier: BSD-3-Clause
// The softmax and the mask of sm90, which any GPU can run: against a model on the host, and against
// WindowMask::allows. Prints a line per check; returns 0 if all hold, 1 if one does not, 77 without
// a GPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <utility>

#include "device/epilogue.cuh"
#include "device/mask.cuh"
#include "device/speculative_softmax.cuh"
#include "tests/support/cuda_blocks.h"

namespace {

using namespace fa;
using namespace fa::test;

constexpr int kRows = device::kBlockRows;
constexpr float kHidden = -INFINITY;

// --- SpeculativeSoftmax ---

constexpr int kTiles = 6;  // of keys
constexpr float kScale = 0.125f;
constexpr float kScaleLog2 = kScale * kLog2E;  // rounded as on the device: both mean the same p

// The scores of a warp's rows, (kTiles, kRows, kCols), in octaves above p = 1.
template <int kCols>
struct ScoresOf {
  Managed<float> raw{size_t{kTiles} * kRows * kCols};

  float& at(int tile, int row, int col) const {
    return raw.data[(tile * kRows + row) * kCols + col];
  }

  // Octaves of (tile, row), and noise below that.
  template <typename Octaves>
  ScoresOf(float noise, Octaves&& octaves) {
    std::mt19937 random(kCols);
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int row = 0; row < kRows; ++row) {
        for (int col = 0; col < kCols; ++col) {
          const float below = noise * static_cast<float>(random() % 4096) / 4096.0f;
          at(tile, row, col) = (octaves(tile, row) - below) / kScaleLog2;
        }
      }
    }
  }
};

// What the softmax says after each tile and in the end.
template <typename Element, int kCols>
struct Results {
  Managed<Element> p{size_t{kTiles} * kRows * kCols, Element(kUntouched)};
  Managed<float> rescale{kTiles * kRows, kUntouched};
  Managed<int> raised{kTiles};
  Managed<float> lse{kRows, kUntouched};
  Managed<float> normalizer{kRows, kUntouched};
};

template <typename Element, int kCols>
__global__ void softmax_kernel(const float* g_scores, Element* g_p, float* g_rescale, int* g_raised,
                               float* g_lse, float* g_normalizer) {
  using Scores = device::Accumulator<kRows, kCols>;
  device::SpeculativeSoftmax<Scores::kRowsPerThread> softmax(kScale);
  for (int tile = 0; tile < kTiles; ++tile) {
    Scores r_scores;
    r_scores.transform([&](float, int row, int block, int i) {
      return g_scores[(tile * kRows + Scores::row(row)) * kCols + Scores::col(block, i)];
    });
    device::OperandA<Element, kRows, kCols> r_p;
    typename Scores::RowValues rescale = {1.0f, 1.0f};
    bool raised = true;
    if (tile == 0) {
      softmax.begin(r_scores, r_p);
    } else {
      raised = softmax.next(r_scores, r_p, rescale);
    }
    if (ptx::lane_index() == 0) {
      g_raised[tile] = raised;
    }
    device::store_row_values<Scores>(rescale, g_rescale + tile * kRows, 0, kRows);
    for (int block = 0; block < Scores::kColBlocks; ++block) {
      for (int row = 0; row < 2; ++row) {
        Element* g_pair = g_p + (tile * kRows + Scores::row(row)) * kCols + Scores::col(block, 0);
        *reinterpret_cast<uint32_t*>(g_pair) = r_p.r[0][block / 2][block % 2 * 2 + row];
      }
    }
  }
  typename Scores::RowValues lse;
  typename Scores::RowValues normalizer;
  softmax.finalize(lse, normalizer);
  device::store_row_values<Scores>(lse, g_lse, 0, kRows);
  device::store_row_values<Scores>(normalizer, g_normalizer, 0, kRows);
}

template <typename Element, int kCols>
void run_softmax(const ScoresOf<kCols>& scores, Results<Element, kCols>& results) {
  run<softmax_kernel<Element, kCols>>(1, ptx::kWarpSize, 0, scores.raw.data, results.p.data,
                                      results.rescale.data, results.raised.data, results.lse.data,
                                      results.normalizer.data);
}

// What the base of a row must be, tile by tile, where all else is exact.
class RowModel {
 public:
  // Octaves above the base.
  double above(float score) const { return double{kScaleLog2} * score - base_; }

  // Takes the base from the first scores of the first tile, if it sees any.
  void begin(const float* scores) {
    const float largest = *std::max_element(
        scores, scores + 16, [](float a, float b) { return std::isnan(a) || a < b; });
    if (std::isfinite(largest)) {
      base_ = static_cast<float>(largest * kScaleLog2);
      has_base_ = true;
    }
  }

  // Sees a tile; true where the base is too low for it, or there is none yet.
  bool see(const float* scores, int cols) {
    double parts[4] = {};  // of the lanes that share the row
    float largest = kHidden;
    for (int col = 0; col < cols; ++col) {
      parts[col % 8 / 2] += std::exp2(above(scores[col]));
      largest = std::fmax(largest, scores[col]);  // no NaN
    }
    const bool asks = !has_base_ || std::any_of(parts, parts + 4, [](double p) { return p > 256; });
    rescale_ = 1;
    if (asks && largest != kHidden) {
      const double base = static_cast<float>(largest * kScaleLog2);
      rescale_ = has_base_ ? std::exp2(base_ - base) : 0;
      base_ = base;
      has_base_ = true;
    }
    return asks;
  }

  double base() const { return base_; }
  double rescale() const { return rescale_; }

 private:
  double base_ = 0;
  double rescale_ = 1;
  bool has_base_ = false;
};

// Relative to what is expected, or to `floor`. Zeros, infinities and NaNs must be the same.
double error(double actual, double expected, double floor) {
  if (std::isnan(expected)) {
    return std::isnan(actual) ? 0.0 : 1.0;
  }
  if (expected == 0 || std::isinf(expected)) {
    return actual == expected ? 0.0 : 1.0;
  }
  return (actual - expected) / std::max(std::abs(expected), floor);
}

template <typename Values>
void expect_errors(const std::string& name, int rows, int cols, double tolerance, Values&& values) {
  expect(name, rows, cols, tolerance, values, [](int, int) { return 0.0; });
}

// Tolerances, for bases within 256 octaves, at most 32 columns of a thread, and six tiles:
//   p        half a place of an element, and no less than float16's subnormals have; and 2^-20, for
//            the argument of exp2, rounded to 2^-20 octaves, and exp2 itself, to 2^-22 of p
//   rescale  two roundings of octaves to 2^-17, and exp2: 2^-16
//   1 / l    2^-20 for p that matter, 2^-19.5 and 5 exp2 to 2^-22 for the rescaling of sums that
//            still matter, 25 additions to 2^-24: 2^-17
//   lse      that, and one fma, which rounds what is below 256 to 2^-17: 2^-16
// `raises`: the number of tiles that raise a base.
template <typename Element, int kCols>
void test_softmax(const char* what, const ScoresOf<kCols>& scores, int raises) {
  Results<Element, kCols> results;
  run_softmax(scores, results);

  RowModel models[kTiles][kRows];  // after each tile
  bool raised[kTiles] = {};
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int row = 0; row < kRows; ++row) {
      RowModel& model = models[tile][row];
      const float* of_row = &scores.at(tile, row, 0);
      if (tile == 0) {
        model.begin(of_row);
      } else {
        model = models[tile - 1][row];
      }
      raised[tile] |= model.see(of_row, kCols) || tile == 0;
    }
  }

  constexpr bool kIsHalf = std::is_same_v<Element, __half>;
  const std::string name = concat("SpeculativeSoftmax, ", kIsHalf ? "float16, " : "bfloat16, ",
                                  kCols, " keys a tile, ", what, ": ");
  expect(
      name + "raises", kTiles, 1, 0, [&](int tile, int) { return results.raised[tile]; },
      [&](int tile, int) { return raised[tile]; });
  report(name + "as often as meant", std::count(raised, raised + kTiles, true) != raises, 1);
  expect_errors(name + "p", kTiles * kRows, kCols, (kIsHalf ? 0x1p-11 : 0x1p-8) + 0x1p-20,
                [&](int r, int c) {
                  const auto p = static_cast<float>(results.p[r * kCols + c]);
                  const RowModel& model = models[r / kRows][r % kRows];
                  return error(p, std::exp2(model.above(scores.at(0, r, c))), 0x1p-14);
                });
  expect_errors(name + "rescale", kTiles * kRows, 1, 0x1p-16, [&](int r, int) {
    const bool is_first = r < kRows;  // there is nothing to rescale
    return error(results.rescale[r], is_first ? 1 : models[r / kRows][r % kRows].rescale(),
                 0x1p-100);
  });

  // Over all scores at once, above the base that the row ended with.
  const auto base = [&](int row) { return models[kTiles - 1][row].base(); };
  const auto sum = [&](int row) {
    double total = 0;
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int col = 0; col < kCols; ++col) {
        total += std::exp2(models[kTiles - 1][row].above(scores.at(tile, row, col)));
      }
    }
    return total;
  };
  expect_errors(name + "normalizer", kRows, 1, 0x1p-17, [&](int row, int) {
    return error(results.normalizer[row], sum(row) == 0 ? 0 : 1 / sum(row), 0);
  });
  expect_errors(name + "lse", kRows, 1, 0x1p-16, [&](int row, int) {
    const double lse = (base(row) + std::log2(sum(row))) * std::log(2.0);
    return std::isfinite(lse) ? results.lse[row] - lse : error(results.lse[row], lse, 0);
  });
}

template <typename Element, int kCols>
void test_softmaxes() {
  using Scores = ScoresOf<kCols>;
  test_softmax<Element, kCols>("ordinary", Scores(8, [](int, int) { return 4.0f; }), 1);

  // Three rows of four rise by 12, 24 and 36 octaves a tile.
  test_softmax<Element, kCols>(
      "rising",
      Scores(4, [](int tile, int row) { return static_cast<float>(12 * tile * (row % 4)); }),
      kTiles);

  // exp2 overflows before the base is raised, and underflows after a fall as deep.
  test_softmax<Element, kCols>("overflow",
                               Scores(4,
                                      [](int tile, int row) {
                                        const float high = tile < 2 ? -100.0f : 100.0f;
                                        return row % 3 == 0 ? high : row % 3 == 1 ? -high : 0.0f;
                                      }),
                               2);

  // The first scores of the first tile are no guide to the others, or hidden.
  Scores low(4, [](int, int) { return 0.0f; });
  for (int row = 0; row < kRows; ++row) {
    for (int col = 0; row % 3 != 0 && col < 16; ++col) {
      low.at(0, row, col) = row % 3 == 1 ? -300.0f / kScaleLog2 : kHidden;
    }
  }
  test_softmax<Element, kCols>("low at first", low, kCols == 16 ? 2 : 1);

  // A thread's part of a row is 128 where nothing is to happen, and 512 where something is, though
  // no p is above 128.
  constexpr float kEnough = kCols == 16 ? 7.0f : kCols == 64 ? 5.0f : 4.0f;
  static_assert(kCols == 16 || kCols == 64 || kCols == 128);
  test_softmax<Element, kCols>(
      "slack",
      Scores(0,
             [](int tile, int row) {
               return tile == 0 ? 0.0f : tile == 3 ? kEnough - 2.0f * (row % 2) : kEnough - 2.0f;
             }),
      2);

  // Rows that see nothing in 0 to 3 tiles, and then scores whose exp2 is 0 without a base; one that
  // sees the first tile alone; and keys here and there that are seen by none.
  Scores masked(4, [](int tile, int row) {
    const bool hidden = row == 5 ? tile > 0 : tile < row % 4;
    return hidden ? kHidden : -200.0f;
  });
  for (int i = 0; i < static_cast<int>(masked.raw.size); i += 5) {
    masked.raw[i] = kHidden;
  }
  test_softmax<Element, kCols>("masked at first", masked, 4);

  test_softmax<Element, kCols>("a row sees nothing",
                               Scores(4, [](int, int row) { return row == 7 ? kHidden : -50.0f; }),
                               kTiles);

  // In the first tile, later, and in the first that a row sees.
  Scores nan(4, [](int tile, int row) { return row == 14 && tile < 2 ? kHidden : 0.0f; });
  for (const auto& [tile, row] : {std::pair{0, 2}, {3, 11}, {2, 14}}) {
    nan.at(tile, row, row) = std::numeric_limits<float>::quiet_NaN();
  }
  test_softmax<Element, kCols>("NaN", nan, 3);
}

// Rows 3 and 12 rise, or do not: it is the same to the others, to the last bit.
template <typename Element, int kCols>
void test_neighbours() {
  const auto rises = [](int row) { return row == 3 || row == 12; };
  ScoresOf<kCols> calm(8, [](int, int) { return 4.0f; });
  ScoresOf<kCols> rising(8, [&](int tile, int row) { return rises(row) ? 20.0f * tile : 4.0f; });
  Results<Element, kCols> calm_results;
  Results<Element, kCols> rising_results;
  run_softmax(calm, calm_results);
  run_softmax(rising, rising_results);
  int wrong = 0;
  for (int row = 0; row < kRows; ++row) {
    const auto differ = [&](auto& a, auto& b, int first, int count) {
      return std::memcmp(a.data + first, b.data + first, count * sizeof(*a.data)) != 0;
    };
    bool differs = differ(calm_results.lse, rising_results.lse, row, 1) ||
                   differ(calm_results.normalizer, rising_results.normalizer, row, 1);
    for (int tile = 0; tile < kTiles; ++tile) {
      const int first = (tile * kRows + row) * kCols;
      differs |= differ(calm_results.p, rising_results.p, first, kCols);
    }
    wrong += differs != rises(row);
  }
  report("SpeculativeSoftmax, rows know nothing of each other, " + std::to_string(kCols) + " keys",
         wrong, kRows);
}

// --- keep_visible_of_warp, keep_seeing_of_warp ---

// Tiles that the blocks of a launch mask, one each: their columns begin at multiples of `step`.
struct TileGrid {
  int first_row;
  int first_col;
  int col_steps;
  int step;

  FA_HOST_DEVICE int row_of(int tile) const { return first_row + tile / col_steps * kRows; }
  FA_HOST_DEVICE int col_of(int tile) const { return first_col + tile % col_steps * step; }
};

template <bool kRowsAreKeys, int kCols>
__global__ void mask_kernel(WindowMask window, TileGrid grid, float* g_out) {
  const auto tile = static_cast<int>(blockIdx.x);
  device::Accumulator<kRows, kCols> r_scores;
  r_scores.transform([](float, int, int, int) { return 1.0f; });
  if constexpr (kRowsAreKeys) {
    device::keep_seeing_of_warp(r_scores, window, grid.row_of(tile), grid.col_of(tile), kHidden);
  } else {
    device::keep_visible_of_warp(r_scores, window, grid.row_of(tile), grid.col_of(tile), kHidden);
  }
  dump(r_scores, g_out, kCols, tile * kRows, 0);
}

// What queries past the end see does not matter, but keys past the end are seen by none.
template <bool kRowsAreKeys, int kCols>
void test_mask_of(const WindowMask& window, const TileGrid& grid, int tiles) {
  Managed<float> out(size_t{kRows * kCols} * tiles, kUntouched);
  run<mask_kernel<kRowsAreKeys, kCols>>(tiles, ptx::kWarpSize, 0, window, grid, out.data);
  struct Pair {
    int query, key;
  };
  const auto at = [&](int r, int c) {
    const int row = grid.row_of(r / kRows) + r % kRows;
    const int col = grid.col_of(r / kRows) + c;
    return kRowsAreKeys ? Pair{col, row} : Pair{row, col};
  };
  expect(
      concat(kRowsAreKeys ? "keep_seeing_of_warp, " : "keep_visible_of_warp, ", kCols,
             " columns from ", grid.first_col, ", rows from ", grid.first_row, ", ",
             window.seqlen_q(), " queries, ", window.seqlen_k(), " keys, ", window.lowest(), " to ",
             window.highest()),
      tiles * kRows, kCols, 0,
      [&](int r, int c) { return at(r, c).query < window.seqlen_q() ? out[r * kCols + c] : 0.0f; },
      [&](int r, int c) {
        const auto [query, key] = at(r, c);
        return query >= window.seqlen_q() ? 0.0f : window.allows(query, key) ? 1.0f : kHidden;
      });
}

void test_mask(const WindowMask& window, const TileGrid& grid, int row_tiles) {
  const int tiles = row_tiles * grid.col_steps;
  test_mask_of<false, 48>(window, grid, tiles);
  test_mask_of<false, 64>(window, grid, tiles);
  test_mask_of<false, 80>(window, grid, tiles);
  test_mask_of<false, 112>(window, grid, tiles);
  test_mask_of<false, 128>(window, grid, tiles);
}

void test_mask_of_keys(const WindowMask& window, const TileGrid& grid, int row_tiles) {
  const int tiles = row_tiles * grid.col_steps;
  test_mask_of<true, 64>(window, grid, tiles);
  test_mask_of<true, 128>(window, grid, tiles);
}

void test_masks() {
  struct Window {
    int left, right;
  };
  constexpr Window kWindows[] = {{-1, -1}, {-1, 0}, {0, 0}, {20, 9}, {3, -1}, {-1, 30}, {150, 0}};
  struct Lengths {
    int q, k;
  };
  for (const auto [q, k] : {Lengths{150, 260}, {260, 150}, {200, 200}, {1, 77}, {90, 3}}) {
    for (const auto [left, right] : kWindows) {
      // Steps that the widths have nothing in common with: tiles begin everywhere.
      test_mask({q, k, left, right}, {0, 0, ceil_div(k, 13), 13}, ceil_div(q, kRows));
      test_mask_of_keys({q, k, left, right}, {0, 0, ceil_div(q, 13), 13}, ceil_div(k, kRows));
    }
  }
  // The longest sequences, and in them the ends of both.
  for (const auto [left, right] : kWindows) {
    const TileGrid grid = {kMaxSeqlen - 3 * kRows, kMaxSeqlen - 160, 12, 13};
    test_mask({kMaxSeqlen, kMaxSeqlen, left, right}, grid, 3);
    test_mask_of_keys({kMaxSeqlen, kMaxSeqlen, left, right}, grid, 3);
  }
}

template <typename Element>
void test_element() {
  test_softmaxes<Element, 16>();
  test_softmaxes<Element, 64>();
  test_softmaxes<Element, 128>();
  test_neighbours<Element, 16>();
  test_neighbours<Element, 64>();
  test_neighbours<Element, 128>();
}

void test_all() {
  test_element<__nv_bfloat16>();
  test_element<__half>();
  test_masks();
}

}  // namespace

int main() { return run_tests(test_all); }
