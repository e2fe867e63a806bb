// SPDX-License-Identifier: BSD-3-Clause
// Masks packed into bits against a loop on the host: every word, in both orientations, and none of
// tiles that a window hides.
// Prints a line per check; returns 0 if all hold, 1 if one does not, 77 without a GPU.
#include <random>
#include <string>

#include "common/check.h"
#include "common/math.h"
#include "support/launch.cuh"
#include "support/pair_bits.h"
#include "tests/support/cuda_blocks.h"

namespace {

using namespace fa;
using namespace fa::test;

constexpr int kBatch = 2;
constexpr int kHeads = 3;

// How a mask of seqlen_q x seqlen_k lies in memory: its lines so many bytes longer than they need
// be, its first byte so many behind the beginning, and every so many-th byte of a line used.
struct Layout {
  const char* name;
  bool queries_last = false;
  int gap = 0;
  int offset = 0;
  int step = 1;
  bool over_batch = false;
  bool over_heads = false;
};

constexpr Layout kLayouts[] = {
    {"rows of keys", false, 16},
    {"rows of queries", true, 16},
    {"packed rows of keys"},
    {"packed rows of queries", true},
    {"rows of keys that begin at fours", false, 4, 4},
    {"rows of queries that begin at fours", true, 4, 4},
    {"odd rows of keys", false, 1, 3},
    {"odd rows of queries", true, 1, 3},
    {"every third key", false, 5, 0, 3},
    {"every other query", true, 0, 1, 2},
    {.name = "one for all batch entries", .over_batch = true},
    {.name = "one for all heads", .over_heads = true},
    {.name = "one matrix", .over_batch = true, .over_heads = true},
};

struct Problem {
  Problem(const Layout& layout, int seqlen_q, int seqlen_k, std::mt19937& random)
      : shape{kBatch, kHeads, 1, seqlen_q, seqlen_k, 64, 64}, bytes(place(layout), 0) {
    for (size_t i = 0; i < bytes.size; ++i) {
      bytes[i] = static_cast<uint8_t>(random() % 2 * (1 << random() % 8));  // any bit says yes
    }
    rules.masks[0] = mask;
    rules.masks[0].data = bytes.data + layout.offset;
  }

  size_t place(const Layout& layout) {
    const int line = layout.queries_last ? shape.seqlen_q : shape.seqlen_k;
    const int lines = layout.queries_last ? shape.seqlen_k : shape.seqlen_q;
    const int64_t stride = int64_t{line} * layout.step + layout.gap;
    const int64_t matrix = lines * stride;
    mask.query_stride = layout.queries_last ? layout.step : stride;
    mask.key_stride = layout.queries_last ? stride : layout.step;
    mask.head_stride = layout.over_heads ? 0 : matrix;
    const int64_t of_batch = matrix * (layout.over_heads ? 1 : kHeads);
    mask.batch_stride = layout.over_batch ? 0 : of_batch;
    return layout.offset + of_batch * (layout.over_batch ? 1 : kBatch);
  }

  bool keeps(int batch, int head, int query, int key) const {
    const KeepMask& all = rules.masks[0];
    return query < shape.seqlen_q && key < shape.seqlen_k &&
           all.of_head<const uint8_t>(batch, head)[all.offset(query, key)] != 0;
  }

  Shape shape;
  KeepMask mask;
  Managed<uint8_t> bytes;
  ScoreRules rules;
};

struct Window {
  int left = -1;
  int right = -1;
};

void test_bits(const Layout& layout, const Problem& problem, int tile_m, int tile_n,
               support::BitRows rows, Window bounds = {}) {
  const Shape& shape = problem.shape;
  const WindowMask window(shape.seqlen_q, shape.seqlen_k, bounds.left, bounds.right);
  PairBits bits =
      PairBits::of(problem.rules, kBatch, kHeads, shape.seqlen_q, shape.seqlen_k, tile_m, tile_n);
  constexpr int kGuard = 64;
  constexpr uint32_t kUnwritten = 0x5A5A5A5A;
  Managed<uint32_t> words(bits.count + kGuard, kUnwritten);
  bits.words = words.data;
  support::launch_pair_bits({problem.rules.masks[0], bits, shape, window, tile_m, tile_n, rows},
                            nullptr);
  check_cuda(cudaDeviceSynchronize(), "run");
  const bool keys_are_rows = rows == support::BitRows::kKeys;
  const int tile_rows = keys_are_rows ? tile_n : tile_m;
  const int row_words = (keys_are_rows ? tile_m : tile_n) / 32;
  int wrong = 0;
  int hidden = 0;
  int64_t count = 0;
  for (int b = 0; b < bits.batch(kBatch); ++b) {
    for (int head = 0; head < bits.heads(kHeads); ++head) {
      for (int i = 0; i < ceil_div(shape.seqlen_q, tile_m); ++i) {
        for (int j = 0; j < ceil_div(shape.seqlen_k, tile_n); ++j) {
          const uint32_t* tile = bits.tile(b, head, i, j);
          bool is_seen = false;
          for (int query = i * tile_m; query < min((i + 1) * tile_m, shape.seqlen_q); ++query) {
            for (int key = j * tile_n; key < min((j + 1) * tile_n, shape.seqlen_k); ++key) {
              is_seen |= window.allows(query, key);
            }
          }
          hidden += !is_seen;
          for (int row = 0; row < tile_rows; ++row) {
            for (int word = 0; word < row_words; ++word, ++count) {
              uint32_t expected = 0;
              for (int bit = 0; bit < 32; ++bit) {
                const int col = row_words * bit + word;
                const int query = i * tile_m + (keys_are_rows ? col : row);
                const int key = j * tile_n + (keys_are_rows ? row : col);
                expected |= static_cast<uint32_t>(problem.keeps(b, head, query, key)) << bit;
              }
              wrong += tile[row * row_words + word] != (is_seen ? expected : kUnwritten);
            }
          }
        }
      }
    }
  }
  wrong += count != bits.count;
  for (int i = 0; i < kGuard; ++i) {
    wrong += words[bits.count + i] != kUnwritten;
  }
  report(concat("bits of ", shape.seqlen_q, "x", shape.seqlen_k, " in ", layout.name, ", tiles ",
                tile_m, "x", tile_n, keys_are_rows ? ", keys first" : "", ", ", hidden, " hidden"),
         wrong, static_cast<int>(count));
}

// More tiles than one launch has blocks, of a pair each.
void test_many_tiles() {
  constexpr int kTileM = 32, kTileN = 64, kTileWords = kTileM * kTileN / 32;
  const Shape shape = {1024, 1100, 1, 1, 1, 64, 64};
  const int64_t tiles = int64_t{shape.batch} * shape.num_heads;
  check(tiles > support::kMaxBlocks, ErrorKind::kRuntime, "the tiles fit one launch");
  Managed<uint8_t> bytes(tiles);
  for (int64_t i = 0; i < tiles; ++i) {
    bytes[i] = i % 3 == 0;
  }
  constexpr uint32_t kUnwritten = 0x5A5A5A5A;
  Managed<uint32_t> words(tiles * kTileWords, kUnwritten);
  const PairBits bits = {.words = words.data,
                         .batch_stride = int64_t{shape.num_heads} * kTileWords,
                         .head_stride = kTileWords,
                         .query_tiles = 1,
                         .key_tiles = 1,
                         .tile_words = kTileWords,
                         .count = tiles * kTileWords};
  const KeepMask mask = {{bytes.data, shape.num_heads, 1, 1, 1}, 0};
  support::launch_pair_bits(
      {mask, bits, shape, WindowMask(1, 1, -1, -1), kTileM, kTileN, support::BitRows::kQueries},
      nullptr);
  check_cuda(cudaDeviceSynchronize(), "run");
  int wrong = 0;
  for (int64_t i = 0; i < bits.count; ++i) {
    const uint32_t expected = i % kTileWords == 0 ? bytes[i / kTileWords] : 0;
    wrong += words[i] != expected;
  }
  report("bits of more tiles than a launch has blocks", wrong, static_cast<int>(bits.count));
}

// What rules have a mask that is packed.
void test_masks() {
  uint8_t byte = 1;
  KeepMask mask;
  int wrong = PairBits::is_of(mask);
  mask.data = &byte;
  mask.query_stride = 100;
  mask.key_stride = 1;
  wrong += !PairBits::is_of(mask);
  KeepMask blocks = mask;
  blocks.block_log2 = 7;
  KeepMask of_keys = mask;
  of_keys.query_stride = 0;
  KeepMask of_queries = mask;
  of_queries.key_stride = 0;
  wrong += PairBits::is_of(blocks) + PairBits::is_of(of_keys) + PairBits::is_of(of_queries);
  report("masks with a byte for each pair", wrong, 5);
}

}  // namespace

int main() {
  return run_tests([] {
    using enum support::BitRows;
    test_masks();
    test_many_tiles();
    std::mt19937 random(0);
    for (const Layout& layout : kLayouts) {
      for (const auto [seqlen_q, seqlen_k] :
           {std::pair{256, 384}, std::pair{260, 140}, std::pair{33, 1}, std::pair{129, 255}}) {
        const Problem problem(layout, seqlen_q, seqlen_k, random);
        for (const auto rows : {kQueries, kKeys}) {
          test_bits(layout, problem, 128, 128, rows);
          test_bits(layout, problem, 64, 128, rows);
          test_bits(layout, problem, 128, 64, rows);
          test_bits(layout, problem, 64, 64, rows);
        }
      }
    }
    const Problem problem({"packed rows of keys"}, 400, 500, random);
    for (const auto rows : {kQueries, kKeys}) {
      test_bits(kLayouts[2], problem, 128, 128, rows, {-1, 0});
      test_bits(kLayouts[2], problem, 64, 128, rows, {50, 10});
    }
  });
}
