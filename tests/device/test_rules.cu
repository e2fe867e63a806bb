// SPDX-License-Identifier: BSD-3-Clause
// What kernels do with sequences and rules for scores before and between their products: clean
// sequences, tile maps, tiles found by number, and a warp's tile of scores, each against the host.
// Prints a line per check; returns 0 if all hold, 1 if one does not, 77 without a GPU.
#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/clean_sequences.h"
#include "device/score_rules.cuh"
#include "device/seen_tiles.cuh"
#include "device/work_order.cuh"
#include "dispatch/registry.h"
#include "support/launch.cuh"
#include "support/pair_bits.h"
#include "support/tile_map.h"
#include "tests/support/cuda_blocks.h"
#include "tests/support/cuda_managed_rules.h"

namespace {

using namespace fa;
using namespace fa::test;

std::mt19937 g_random(0);
int draw(int least, int most) { return std::uniform_int_distribution<int>(least, most)(g_random); }

// What a caller may give, and where what comes of it is to be written.
struct Side {
  Side(int batch, bool packed, bool used)
      : cu_seqlens(batch + 1),
        seqused(batch + 1),
        clean_cu_seqlens(batch + 1),
        clean_seqused(batch + 1) {
    const int rows = draw(0, 5000);
    for (int i = 0; i <= batch; ++i) {
      const int even = static_cast<int>(int64_t{rows} * i / std::max(batch, 1));
      cu_seqlens[i] = draw(0, 9) == 0 ? draw(-100, rows + 100) : even;
    }
    for (int i = 0; i < batch; ++i) {
      seqused[i] = draw(-2, 60);
    }
    given = {packed ? cu_seqlens.data : nullptr,
             used ? seqused.data : nullptr,
             batch,
             rows,
             draw(0, 100),
             packed ? clean_cu_seqlens.data : nullptr,
             clean_seqused.data};
  }

  int wrong() const {
    std::vector<int32_t> first_rows(given.batch + 1);
    std::vector<int32_t> lengths(given.batch);
    GivenSequences on_host = given;
    on_host.clean_cu_seqlens = first_rows.data();
    on_host.clean_seqused = lengths.data();
    clean_sequences(on_host);
    int wrong = !std::equal(lengths.begin(), lengths.end(), clean_seqused.data);
    if (given.cu_seqlens != nullptr) {
      wrong += !std::equal(first_rows.begin(), first_rows.end(), clean_cu_seqlens.data);
    }
    return wrong;
  }

  Managed<int32_t> cu_seqlens, seqused, clean_cu_seqlens, clean_seqused;
  GivenSequences given;
};

void test_clean_sequences() {
  for (const int batch : {0, 1, 31, 1023, 1024, 5000}) {
    int wrong = 0;
    for (int trial = 0; trial < 8; ++trial) {
      const Side queries(batch, trial % 2 == 0, trial % 3 == 0);
      const Side keys(batch, trial % 4 != 3, trial % 3 != 2);
      const bool only_keys = trial == 7;
      registry().clean_sequences_on_cuda(only_keys ? nullptr : &queries.given, &keys.given,
                                         nullptr);
      check_cuda(cudaDeviceSynchronize(), "run");
      wrong += (only_keys ? 0 : queries.wrong()) + keys.wrong();
    }
    report("clean sequences, batch " + std::to_string(batch), wrong, 16);
  }
}

__global__ void find_tile_kernel(Sequences sequences, int batch, int seqlen, int tile_rows,
                                 int numbers, int2* g_found) {
  for (int number = 0; number < numbers; ++number) {
    const auto found = device::find_tile(sequences, number, batch, seqlen, tile_rows);
    g_found[number] = {found.batch, found.tile};
  }
}

// Each tile of each sequence has a number, and other numbers lie past the end of a sequence.
void test_find_tile() {
  for (const int batch : {1, 2, 31, 33, 1000, 1100}) {
    std::vector<int32_t> first_rows = {draw(0, 200)};
    for (int b = 0; b < batch; ++b) {
      first_rows.push_back(first_rows.back() + (draw(0, 3) == 0 ? 0 : draw(0, 100)));
    }
    const auto cu_seqlens = managed(first_rows);
    const Sequences sequences = {.cu_seqlens = cu_seqlens->data,
                                 .packed_rows = first_rows.back() + draw(0, 300)};
    constexpr int kTileRows = 32;
    const int seqlen = sequences.packed_rows;
    const int numbers =
        static_cast<int>(sequences.count_tiles(batch, sequences.packed_rows, seqlen, kTileRows));
    Managed<int2> found(numbers);
    run<find_tile_kernel>(1, 32, 0, sequences, batch, seqlen, kTileRows, numbers, found.data);
    int wrong = 0;
    int tiles = 0;
    for (int number = 0; number < numbers; ++number) {
      const int b = found[number].x;
      const int tile = found[number].y;
      const int length = sequences.at(b, seqlen).length;
      const bool exists = tile * kTileRows < length;
      tiles += exists;
      wrong += tile < 0 || (exists && sequences.first_tile(b, seqlen, kTileRows) + tile != number);
    }
    for (int b = 0; b < batch; ++b) {
      tiles -= ceil_div(sequences.at(b, seqlen).length, kTileRows);
    }
    report("tiles by number, batch " + std::to_string(batch), wrong + (tiles != 0), numbers);
  }
}

TileClass class_of_counts(int seen, int all) {
  return seen == all ? TileClass::kSeen : seen == 0 ? TileClass::kHidden : TileClass::kMixed;
}

// What the map may say of a tile: what its pairs say, but mixed where that takes several rules, or
// documents that change inside a tile.
bool is_right(TileClass actual, TileClass pairs, bool must_be_exact) {
  return actual == pairs || (actual == TileClass::kMixed && !must_be_exact);
}

void test_tile_map(const RuleCase& test, int tile_m, int tile_n) {
  const Rules rules(test, g_random);
  const Shape& shape = test.shape;
  std::vector<int32_t> first_rows = {0};
  for (const int length : test.lengths) {
    first_rows.push_back(first_rows.back() + length);
  }
  const auto cu_seqlens = managed(first_rows);
  Sequences sequences;
  if (!test.lengths.empty()) {
    sequences = {.cu_seqlens = cu_seqlens->data, .packed_rows = first_rows.back()};
  }
  const int key_tiles = ceil_div(shape.seqlen_k, tile_n);
  const int64_t of_head =
      key_tiles * sequences.count_tiles(shape.batch, sequences.packed_rows, shape.seqlen_q, tile_m);
  const ScoreRules view = rules.view();
  const bool by_head = std::any_of(std::begin(view.masks), std::end(view.masks),
                                   [](const KeepMask& mask) { return mask.head_stride != 0; });
  const bool has_bits = test.lengths.empty() && tile_n % 64 == 0;
  PairBits bits = has_bits ? PairBits::of(view, shape.batch, shape.num_heads, shape.seqlen_q,
                                          shape.seqlen_k, tile_m, tile_n)
                           : PairBits{};
  const WindowMask window(shape.seqlen_q, shape.seqlen_k, test.left, test.right);
  Managed<uint32_t> words(bits.count + 1);
  if (bits.count > 0) {
    bits.words = words.data;
    support::launch_pair_bits(
        {view.masks[0], bits, shape, window, tile_m, tile_n, support::BitRows::kQueries}, nullptr);
  }
  constexpr auto kUnwritten = static_cast<TileClass>(77);
  Managed<TileClass> classes(of_head * (by_head ? shape.num_heads : 1), kUnwritten);
  const TileMap map = {classes.data, by_head ? of_head : 0, key_tiles};
  support::launch_tile_map({view, window, shape, sequences, sequences, bits, map, tile_m, tile_n},
                           nullptr);
  check_cuda(cudaDeviceSynchronize(), "run");

  const bool is_one_mask = view.masks[1].data == nullptr && view.document_ids == nullptr &&
                           view.prefix_lens == nullptr && test.left < 0 && test.right < 0;
  int wrong = 0;
  int count = 0;
  int found[3] = {};
  for (int b = 0; b < shape.batch; ++b) {
    const int queries = sequences.at(b, shape.seqlen_q).length;
    const int keys = sequences.at(b, shape.seqlen_k).length;
    for (int head = 0; head < (by_head ? shape.num_heads : 1); ++head) {
      const Visibility visibility(view, window.over(queries, keys), b, head);
      for (int i = 0; i < queries; i += tile_m) {
        for (int j = 0; j < keys; j += tile_n) {
          int seen = 0;
          int all = 0;
          for (int query = i; query < std::min(i + tile_m, queries); ++query) {
            for (int key = j; key < std::min(j + tile_n, keys); ++key) {
              seen += visibility.allows(query, key);
              ++all;
            }
          }
          // Keys past the end are seen by none.
          const TileClass pairs = class_of_counts(seen, j + tile_n > keys ? all + 1 : all);
          const TileClass actual = map.at(
              head, sequences.first_tile(b, shape.seqlen_q, tile_m) + i / tile_m, j / tile_n);
          wrong += !is_right(actual, pairs, is_one_mask);
          ++found[std::min(static_cast<int>(actual), 2)];
          ++count;
        }
      }
    }
  }
  report(concat("tile map, ", test.name, ", tiles ", tile_m, "x", tile_n,
                bits.count > 0 ? ", by bits: " : ": ", found[0], " hidden, ", found[1], " mixed"),
         wrong, count);
}

const RuleCase kRuleCases[] = {
    {"a mask", {2, 2, 1, 300, 512, 64, 64}, {.masks = {{}}}},
    {"a mask of one matrix in squares",
     {2, 2, 1, 512, 700, 64, 64},
     {.masks = {{.over = {.batch = true, .head = true}, .grain = 128, .keep = 0.5}}}},
    {"a mask in squares, queries last",
     {1, 3, 1, 700, 512, 64, 64},
     {.masks = {{.queries_last = true, .grain = 128, .keep = 0.5}}}},
    {"a mask of odd rows", {1, 1, 1, 261, 259, 64, 64}, {.masks = {{.grain = 64, .keep = 0.5}}}},
    {"a mask of keys",
     {2, 1, 1, 300, 700, 64, 64},
     {.masks = {{.over = {.head = true, .query = true}, .grain = 200, .keep = 0.5}}}},
    {"a mask of queries",
     {1, 2, 1, 700, 300, 64, 64},
     {.masks = {{.over = {.key = true}, .grain = 200, .keep = 0.5}}}},
    {"a mask of blocks", {2, 2, 1, 700, 900, 64, 64}, {.masks = {{.block_log2 = 7, .keep = 0.5}}}},
    {"a mask, causal", {1, 2, 1, 512, 512, 64, 64}, {.masks = {{.grain = 64, .keep = 0.8}}}, -1, 0},
    {"three masks",
     {1, 2, 1, 300, 300, 64, 64},
     {.masks = {{.grain = 64, .keep = 0.8},
                {.over = {.query = true}, .grain = 64, .keep = 0.8},
                {.block_log2 = 7, .keep = 0.8}}}},
    {"documents", {2, 1, 1, 600, 600, 64, 64}, {.documents = 3}, -1, 0},
    {"documents and a prefix",
     {2, 1, 1, 600, 600, 64, 64},
     {.documents = 2, .prefix_lens = {200, 10}},
     40,
     0},
    {"a mask, packed",
     {5, 2, 1, 300, 300, 64, 64},
     {.masks = {{.over = {.batch = true}, .grain = 64, .keep = 0.5}}},
     -1,
     0,
     {300, 0, 1, 129, 64}},
};

// More blocks than one launch has, each of which tells one class.
void test_map_of_many_heads(int block_log2) {
  constexpr int kTile = 128;
  const Shape shape = {1024, 1100, 1, kTile, kTile, 64, 64};
  const int64_t heads = int64_t{shape.batch} * shape.num_heads;
  check(heads > support::kMaxBlocks, ErrorKind::kRuntime, "the tiles fit one launch");
  Managed<uint8_t> bytes(heads);
  for (int64_t i = 0; i < heads; ++i) {
    bytes[i] = i % 3 == 0;
  }
  ScoreRules rules;
  rules.masks[0] = {{bytes.data, shape.num_heads, 1, 0, 0}, block_log2};
  constexpr auto kUnwritten = static_cast<TileClass>(77);
  Managed<TileClass> classes(heads, kUnwritten);
  const TileMap map = {classes.data, shape.batch, 1};
  support::launch_tile_map(
      {rules, WindowMask(kTile, kTile, -1, -1), shape, {}, {}, {}, map, kTile, kTile}, nullptr);
  check_cuda(cudaDeviceSynchronize(), "run");
  int wrong = 0;
  for (int b = 0; b < shape.batch; ++b) {
    for (int head = 0; head < shape.num_heads; ++head) {
      const TileClass expected =
          bytes[int64_t{b} * shape.num_heads + head] != 0 ? TileClass::kSeen : TileClass::kHidden;
      wrong += map.at(head, b, 0) != expected;
    }
  }
  report(concat("tile map of many heads, a byte for ", 1 << block_log2), wrong,
         static_cast<int>(heads));
}

// The scores of one warp after its rules: scale * score + bias, -1000 where hidden.
template <typename Scores>
__global__ void rules_kernel(const __grid_constant__ ScoreRules rules, WindowMask window,
                             int first_query, int first_key, float* g_scores) {
  Scores r_scores;
  r_scores.transform([](float, int row, int block, int i) {
    return static_cast<float>(Scores::row(row) - Scores::col(block, i));
  });
  const device::HeadRules of_head(rules, PrefixWindow(rules, window, 1), 1, 2);
  of_head.finish_scores(r_scores, 0.5f, first_query, first_key);
  device::SeenColumns<Scores> seen;
  of_head.find_seen<Scores>(seen, first_query, first_key);
  device::keep_seen(r_scores, seen, -1000.0f);
  dump(r_scores, g_scores, 256, 0, 0);
}

template <typename Scores>
void test_scores(const std::string& layout) {
  constexpr int kStride = 256;
  const RuleCase test = {"scores",
                         {2, 3, 1, 150, 170, 64, 64},
                         {.bias = BiasSpec{},
                          .masks = {{}, {.over = {.query = true}}, {.block_log2 = 7, .keep = 0.8}},
                          .documents = 2,
                          .prefix_lens = {0, 60}}};
  const Rules rules(test, g_random);
  const WindowMask window(150, 170, 50, 10);
  for (const int first_query : {0, 48, 112}) {
    for (const int first_key : {0, 32, 96, 144}) {
      Managed<float> scores(kStride * kStride, kUntouched);
      run<rules_kernel<Scores>>(1, 32, 0, rules.view(), window, first_query, first_key,
                                scores.data);
      const ScoreRules view = rules.view();
      const Visibility visibility(view, window, 1, 2);
      int wrong = 0;
      int count = 0;
      for (int row = 0; row < kStride; ++row) {
        for (int col = 0; col < kStride; ++col) {
          const int query = first_query + row;
          const int key = first_key + col;
          const float actual = scores[row * kStride + col];
          if (actual == kUntouched) {
            continue;  // of another warp
          }
          float expected = -1000.0f;
          if (query < 150 && key < 170 && visibility.allows(query, key)) {
            expected = 0.5f * static_cast<float>(row - col) +
                       view.bias.of_head<float>(1, 2)[view.bias.offset(query, key)];
          }
          wrong += actual != expected;
          ++count;
        }
      }
      report(concat("scores of ", layout, " from ", first_query, ", ", first_key),
             wrong + (count != Scores::kRows * Scores::kCols), count);
    }
  }
}

}  // namespace

int main() {
  return run_tests([] {
    test_clean_sequences();
    test_find_tile();
    for (const RuleCase& test : kRuleCases) {
      test_tile_map(test, 128, 128);
      test_tile_map(test, 128, 64);
      test_tile_map(test, 64, 32);
      test_tile_map(test, 32, 112);
    }
    test_map_of_many_heads(0);
    test_map_of_many_heads(7);
    test_scores<device::Accumulator<16, 64>>("whole rows");
    test_scores<device::Accumulator<32, 32>>("two blocks of rows");
    test_scores<device::Accumulator<32, 32, 64, 48>>("warps that take turns");
  });
}
