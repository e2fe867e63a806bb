// SPDX-License-Identifier: BSD-3-Clause
// Windows with a prefix against their definition, over every small mask and tile; and what masks,
// documents, prefix and window say together.
#include "common/score_rules.h"

#include <algorithm>
#include <cstdint>
#include <random>
#include <set>
#include <vector>

#include "common/tile_map.h"
#include "tests/support/check.h"

namespace {

using fa::KeepMask;
using fa::PrefixWindow;
using fa::Range;
using fa::ScoreRules;
using fa::TileClass;
using fa::Visibility;
using fa::WindowMask;

constexpr int kLongest = 7;
constexpr int kPastEnd = 2;  // how far tiles reach beyond their sequence

#define EXPECT_PREFIX(condition, window, queries, keys)                                    \
  FA_EXPECT(condition, "seqlen_q", (window).window().seqlen_q(), "seqlen_k",               \
            (window).window().seqlen_k(), "prefix", (window).prefix(), "lowest",           \
            (window).window().lowest(), "highest", (window).window().highest(), "queries", \
            (queries).begin, (queries).end, "keys", (keys).begin, (keys).end)

// Bounds of a set of bits.
bool is_hull(Range range, uint32_t set) {
  if (set == 0) {
    return range.begin == range.end;
  }
  return range.begin == __builtin_ctz(set) && range.end == 32 - __builtin_clz(set);
}

// Calls visit(tile) for all tiles that begin in a sequence, and for empty ones.
template <typename Visitor>
void for_each_tile(int seqlen, const Visitor& visit) {
  for (int begin = 0; begin <= seqlen; ++begin) {
    for (int end = begin; end <= seqlen + kPastEnd; ++end) {
      visit(Range{begin, end});
    }
  }
}

void check_window(const WindowMask& mask, int given_prefix) {
  const int32_t prefix_lens[] = {-1, given_prefix};
  ScoreRules rules;
  rules.prefix_lens = prefix_lens;
  const PrefixWindow window(rules, mask, 1);
  const int seqlen_q = mask.seqlen_q();
  const int seqlen_k = mask.seqlen_k();
  EXPECT_PREFIX(window.prefix() == std::clamp(given_prefix, 0, seqlen_k), window, (Range{0, 0}),
                (Range{0, 0}));

  // The definition, a bit for each key of a query and for each query of a key.
  uint32_t keys_of[kLongest + kPastEnd] = {};
  uint32_t queries_of[kLongest + kPastEnd] = {};
  for (int query = 0; query < seqlen_q; ++query) {
    for (int key = -1; key < seqlen_k + kPastEnd; ++key) {
      const bool exists = 0 <= key && key < seqlen_k;
      const bool seen = exists && (mask.allows(query, key) || key < given_prefix);
      EXPECT_PREFIX(window.allows(query, key) == seen, window, (Range{query, query}),
                    (Range{key, key}));
      if (seen) {
        keys_of[query] |= 1u << key;
        queries_of[key] |= 1u << query;
      }
    }
  }
  for_each_tile(seqlen_k, [&](Range keys) {
    uint32_t any = 0;
    for (int key = keys.begin; key < keys.end; ++key) {
      any |= queries_of[key];
    }
    EXPECT_PREFIX(is_hull(window.queries_seeing_any(keys), any), window, (Range{0, 0}), keys);
  });
  for_each_tile(seqlen_q, [&](Range queries) {
    uint32_t any = 0;
    uint32_t all = ~0u;
    for (int query = queries.begin; query < std::min(queries.end, seqlen_q); ++query) {
      any |= keys_of[query];
      all &= keys_of[query];
    }
    EXPECT_PREFIX(is_hull(window.keys_seen_by_any(queries), any), window, queries, (Range{0, 0}));
    if (queries.begin >= std::min(queries.end, seqlen_q)) {
      return;
    }
    for_each_tile(seqlen_k, [&](Range keys) {
      if (keys.empty()) {
        return;
      }
      const uint32_t tile = (1u << keys.end) - (1u << keys.begin);
      EXPECT_PREFIX(window.any(queries, keys) == ((any & tile) != 0), window, queries, keys);
      EXPECT_PREFIX(window.all(queries, keys) == ((all & tile) == tile), window, queries, keys);
      const TileClass expected = (all & tile) == tile ? TileClass::kSeen
                                 : (any & tile) != 0  ? TileClass::kMixed
                                                      : TileClass::kHidden;
      EXPECT_PREFIX(class_of(window, queries, keys) == expected, window, queries, keys);
    });
  });
}

void check_every_small_window() {
  for (int seqlen_q = 0; seqlen_q <= kLongest; ++seqlen_q) {
    for (int seqlen_k = 0; seqlen_k <= kLongest; ++seqlen_k) {
      for (int left = -1; left <= kLongest; ++left) {
        for (int right = -1; right <= kLongest; ++right) {
          for (int prefix = -2; prefix <= seqlen_k + 2; ++prefix) {
            check_window({seqlen_q, seqlen_k, left, right}, prefix);
          }
        }
      }
    }
  }
}

// A rule's own window has no prefix.
void check_without_prefix() {
  const WindowMask causal(4, 6, -1, 0);
  const PrefixWindow window({}, causal, 3);
  FA_EXPECT_EQ(window.prefix(), 0);
  FA_EXPECT(!window.allows(0, 3) && window.allows(0, 2));
}

void check_what_there_is() {
  const int32_t numbers[] = {0};
  uint8_t byte = 1;
  ScoreRules none;
  FA_EXPECT(!none.any() && !none.has_data_masks());
  ScoreRules rules;
  rules.bias.data = &byte;
  FA_EXPECT(rules.any() && !rules.has_data_masks());
  rules = {};
  rules.prefix_lens = numbers;
  FA_EXPECT(rules.any() && !rules.has_data_masks());
  rules = {};
  rules.document_ids = numbers;
  FA_EXPECT(rules.any() && rules.has_data_masks());
  rules = {};
  rules.masks[0].data = &byte;
  FA_EXPECT(rules.any() && rules.has_data_masks());
}

// Two batch entries of three heads: a mask of pairs, one of keys alone, one of blocks of 4 x 4.
void check_visibility() {
  constexpr int kBatch = 2, kHeads = 3, kQueries = 9, kKeys = 11;
  constexpr int kBlockRows = 3, kBlockColumns = 3;
  std::mt19937 random(0);
  const auto draw_bytes = [&random](int count) {
    std::vector<uint8_t> bytes(count);
    for (uint8_t& byte : bytes) {
      byte = random() % 4 == 0 ? 0 : 1 + random() % 255;
    }
    return bytes;
  };
  std::vector<uint8_t> pairs = draw_bytes(kBatch * kHeads * kQueries * kKeys);
  std::vector<uint8_t> keys = draw_bytes(kBatch * kKeys);
  std::vector<uint8_t> blocks = draw_bytes(kHeads * kBlockRows * kBlockColumns);
  std::vector<int32_t> documents(kBatch * kKeys);
  for (int32_t& document : documents) {
    document = static_cast<int32_t>(random() % 2) - 1;
  }
  const int32_t prefix_lens[kBatch] = {0, 4};
  const WindowMask causal(kQueries, kKeys, -1, 0);

  for (int subset = 0; subset < 32; ++subset) {
    ScoreRules rules;
    int masks = 0;
    const auto has = [subset](int rule) { return (subset >> rule & 1) != 0; };
    if (has(0)) {
      rules.masks[masks++] = {{pairs.data(), kHeads * kQueries * kKeys, kQueries * kKeys, kKeys, 1},
                              0};
    }
    if (has(1)) {
      rules.masks[masks++] = {{keys.data(), kKeys, 0, 0, 1}, 0};
    }
    if (has(2)) {
      rules.masks[masks++] = {{blocks.data(), 0, kBlockRows * kBlockColumns, 1, kBlockRows}, 2};
    }
    if (has(3)) {
      rules.document_ids = documents.data();
      rules.document_stride = kKeys;
    }
    rules.prefix_lens = has(4) ? prefix_lens : nullptr;
    for (int b = 0; b < kBatch; ++b) {
      for (int h = 0; h < kHeads; ++h) {
        const Visibility visibility(rules, causal, b, h);
        for (int i = 0; i < kQueries; ++i) {
          for (int j = 0; j < kKeys; ++j) {
            const bool by_data =
                (!has(0) || pairs[((b * kHeads + h) * kQueries + i) * kKeys + j] != 0) &&
                (!has(1) || keys[b * kKeys + j] != 0) &&
                (!has(2) || blocks[(h * kBlockColumns + j / 4) * kBlockRows + i / 4] != 0) &&
                (!has(3) || documents[b * kKeys + i] == documents[b * kKeys + j]);
            const bool by_window = causal.allows(i, j) || (has(4) && j < prefix_lens[b]);
            FA_EXPECT_EQ(visibility.data_allow(i, j), by_data, "rules", subset, "at", b, h, i, j);
            FA_EXPECT_EQ(visibility.allows(i, j), by_data && by_window, "rules", subset, "at", b, h,
                         i, j);
          }
        }
      }
    }
  }
}

void check_offsets_beyond_32_bits() {
  constexpr int64_t kLarge = int64_t{1} << 31;
  const fa::ScoreTensor tensor = {nullptr, kLarge, kLarge + 1, kLarge + 2, kLarge + 3};
  FA_EXPECT_EQ(tensor.offset(3, 5), 3 * (kLarge + 2) + 5 * (kLarge + 3));
  FA_EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.of_head<float>(3, 5)),
               4 * static_cast<uintptr_t>(3 * kLarge + 5 * (kLarge + 1)));
}

void check_bytes_of_masks() {
  constexpr int kBatch = 2, kHeads = 3, kQueries = 100, kKeys = 1000;
  struct Layout {
    const char* name;
    int64_t batch_stride, head_stride, query_stride, key_stride;
    int64_t expected;
  };
  constexpr int64_t kAll = int64_t{kBatch} * kHeads * kQueries * kKeys;
  for (const Layout& layout : {
           Layout{"contiguous", 300000, 100000, 1000, 1, kAll},
           Layout{"with gaps", 900000, 200000, 1500, 1, kAll},
           Layout{"heads last", 300000, 1, 3000, 3, kAll},
           Layout{"one matrix", 0, 0, 1000, 1, kQueries * kKeys},
           Layout{"of heads", 0, 100000, 1000, 1, kHeads * kQueries * kKeys},
           Layout{"of keys", 1000, 0, 0, 1, kBatch * kKeys},
           Layout{"one byte", 0, 0, 0, 0, 1},
           Layout{"rows that overlap", 0, 0, 1, 1, kQueries + kKeys - 1},
           Layout{"rows that overlap, in matrices far away", 1 << 30, 1 << 20, 8, 1,
                  kBatch * kHeads * (8 * (kQueries - 1) + kKeys)},
           Layout{"matrices that overlap", 0, 1, 1000, 1, kQueries * kKeys + kHeads - 1},
       }) {
    const fa::KeepMask mask = {
        {nullptr, layout.batch_stride, layout.head_stride, layout.query_stride, layout.key_stride},
        0};
    const int64_t count = fa::PairBits::bytes_of(mask, kBatch, kHeads, kQueries, kKeys);
    std::set<int64_t> bytes;
    for (int b = 0; b < kBatch; ++b) {
      for (int h = 0; h < kHeads; ++h) {
        for (int i = 0; i < kQueries; ++i) {
          for (int j = 0; j < kKeys; ++j) {
            bytes.insert(b * layout.batch_stride + h * layout.head_stride + mask.offset(i, j));
          }
        }
      }
    }
    FA_EXPECT_EQ(count, layout.expected, layout.name);
    FA_EXPECT(count >= static_cast<int64_t>(bytes.size()), layout.name);
  }
}

// Bits take no more memory than the mask, but for a little.
void check_bytes_of_pair_bits() {
  uint8_t byte = 1;
  ScoreRules rules;
  const auto bits_of = [&rules](int heads, int seqlen_q, int seqlen_k) {
    return fa::PairBits::of(rules, 2, heads, seqlen_q, seqlen_k, 128, 128);
  };
  for (const int heads : {1, 8, 64}) {
    for (const int seqlen_q : {1, 2, 15, 16, 17, 129, 5000}) {
      for (const int seqlen_k : {1, 10, 100, 1000, 100000}) {
        const int64_t matrix = int64_t{seqlen_q} * seqlen_k;
        rules.masks[0] = {{&byte, heads * matrix, matrix, seqlen_k, 1}, 0};
        const int64_t whole = 2 * heads * int64_t{fa::ceil_div(seqlen_q, 128)} *
                              fa::ceil_div(seqlen_k, 128) * 128 * 128 / 8;
        const bool fits = whole <= 1 << 20 || whole <= 2 * heads * matrix;
        FA_EXPECT_EQ(bits_of(heads, seqlen_q, seqlen_k).bytes(), fits ? whole : 0, heads, "heads,",
                     seqlen_q, "x", seqlen_k);
      }
    }
  }
  rules.masks[0] = {{&byte, 0, 0, 1, 1}, 0};
  FA_EXPECT_EQ(bits_of(1, 2000, 2000).bytes(), 16 * 16 * 2048, "rows that overlap");
  FA_EXPECT_EQ(bits_of(1, 4000, 4000).bytes(), 0, "long rows that overlap");
}

// Only a mask that has a byte for each pair is packed, and its tiles lie one after the other.
void check_pair_bits() {
  uint8_t byte = 1;
  ScoreRules rules;
  const auto bits_of = [&rules](int seqlen_q, int seqlen_k) {
    return fa::PairBits::of(rules, 3, 2, seqlen_q, seqlen_k, 128, 64);
  };
  FA_EXPECT_EQ(bits_of(200, 200).count, 0);
  rules.masks[0] = {{&byte, 0, 0, 0, 1}, 0};
  FA_EXPECT_EQ(bits_of(200, 200).count, 0, "of keys");
  rules.masks[0] = {{&byte, 0, 0, 1, 0}, 0};
  FA_EXPECT_EQ(bits_of(200, 200).count, 0, "of queries");
  rules.masks[0] = {{&byte, 0, 0, 2, 1}, 7};
  FA_EXPECT_EQ(bits_of(200, 200).count, 0, "of blocks");
  rules.masks[0] = {{&byte, 0, 0, 200, 1}, 0};
  FA_EXPECT_EQ(bits_of(0, 200).count, 0, "of nothing");
  constexpr int64_t kTileWords = 128 * 64 / 32;
  for (const bool by_batch : {false, true}) {
    for (const bool by_head : {false, true}) {
      rules.masks[0].batch_stride = by_batch ? 80000 : 0;
      rules.masks[0].head_stride = by_head ? 40000 : 0;
      const fa::PairBits bits = bits_of(200, 200);
      int64_t next = 0;
      for (int b = 0; b < bits.batch(3); ++b) {
        for (int h = 0; h < bits.heads(2); ++h) {
          for (int i = 0; i < 2; ++i) {
            for (int j = 0; j < 4; ++j, next += kTileWords) {
              FA_EXPECT_EQ(bits.tile(b, h, i, j) - bits.words, next, "at", b, h, i, j);
            }
          }
        }
      }
      FA_EXPECT_EQ(bits.count, next);
      FA_EXPECT_EQ(bits.count, (by_batch ? 3 : 1) * (by_head ? 2 : 1) * 8 * kTileWords);
      FA_EXPECT(by_batch || bits.tile(2, 1, 1, 3) == bits.tile(0, 1, 1, 3));
      FA_EXPECT(by_head || bits.tile(2, 1, 1, 3) == bits.tile(2, 0, 1, 3));
    }
  }
  constexpr int64_t kLong = 1 << 20;
  rules.masks[0] = {{&byte, 2 * kLong * kLong, kLong * kLong, kLong, 1}, 0};
  const fa::PairBits large = bits_of(kLong, kLong);
  FA_EXPECT_EQ(large.bytes(), 6 * kLong * kLong / 8);
  FA_EXPECT_EQ(large.tile(2, 1, (1 << 13) - 1, (1 << 14) - 1) - large.words,
               large.count - kTileWords);
}

}  // namespace

int main() {
  check_every_small_window();
  check_without_prefix();
  check_what_there_is();
  check_visibility();
  check_offsets_beyond_32_bits();
  check_bytes_of_masks();
  check_pair_bits();
  check_bytes_of_pair_bits();
  return fa::test::report("common/test_score_rules");
}
