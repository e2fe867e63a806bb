// SPDX-License-Identifier: BSD-3-Clause
// WindowMask against its definition: every small mask and tile as sets of bits, then the largest
// lengths against 64-bit arithmetic.
#include "common/window.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "tests/support/check.h"

namespace {

using fa::Range;
using fa::WindowMask;

constexpr int64_t kHuge = int64_t{1} << 40;

struct Mask {
  int seqlen_q;
  int seqlen_k;
  int64_t left;
  int64_t right;

  WindowMask under_test() const { return {seqlen_q, seqlen_k, left, right}; }

  // The definition.
  bool visible(int64_t query, int64_t key) const {
    const int64_t diagonal = query + seqlen_k - seqlen_q;
    return 0 <= query && query < seqlen_q && 0 <= key && key < seqlen_k &&
           (left < 0 || diagonal - key <= left) && (right < 0 || key - diagonal <= right);
  }
};

#define EXPECT_MASK(condition, mask, tile)                                               \
  FA_EXPECT(condition, "seqlen_q", (mask).seqlen_q, "seqlen_k", (mask).seqlen_k, "left", \
            (mask).left, "right", (mask).right, "tile", (tile).begin, (tile).end)

// A set of queries or of keys, one bit each.
using Set = uint32_t;

bool is_set(Range range, Set expected, int limit) {
  if (!(0 <= range.begin && range.begin <= range.end && range.end <= limit)) {
    return false;
  }
  const Set actual = ((Set{1} << range.end) - 1) & ~((Set{1} << range.begin) - 1);
  return actual == expected;
}

constexpr int kLongest = 12;
constexpr int kPastEnd = 4;  // how far tiles reach beyond their sequence

void check_rows_and_columns(const Mask& mask) {
  const WindowMask window = mask.under_test();
  Set keys_of[kLongest + kPastEnd + 1] = {};     // of a query
  Set queries_of[kLongest + kPastEnd + 1] = {};  // of a key
  bool full = true;
  for (int query = 0; query < mask.seqlen_q; ++query) {
    for (int key = -2; key < mask.seqlen_k + kPastEnd; ++key) {
      const bool visible = mask.visible(query, key);
      EXPECT_MASK(window.allows(query, key) == visible, mask, (Range{query, key}));
      if (visible) {
        keys_of[query] |= Set{1} << key;
        queries_of[key] |= Set{1} << query;
      } else if (0 <= key && key < mask.seqlen_k) {
        full = false;
      }
    }
  }
  EXPECT_MASK(window.is_full() == full, mask, (Range{0, 0}));

  for (int begin = 0; begin <= mask.seqlen_q + 1; ++begin) {
    Set any = 0;
    Set all = (Set{1} << mask.seqlen_k) - 1;
    for (int end = begin; end <= mask.seqlen_q + kPastEnd; ++end) {
      if (end > begin && end <= mask.seqlen_q) {
        any |= keys_of[end - 1];
        all &= keys_of[end - 1];
      }
      const Range tile{begin, end};
      const bool no_query = begin >= std::min(end, mask.seqlen_q);
      EXPECT_MASK(is_set(window.keys_seen_by_any(tile), any, mask.seqlen_k), mask, tile);
      EXPECT_MASK(is_set(window.keys_seen_by_all(tile), no_query ? 0 : all, mask.seqlen_k), mask,
                  tile);
    }
  }

  for (int begin = 0; begin <= mask.seqlen_k + 1; ++begin) {
    Set any = 0;
    Set all = (Set{1} << mask.seqlen_q) - 1;
    for (int end = begin; end <= mask.seqlen_k + kPastEnd; ++end) {
      if (end > begin) {
        any |= queries_of[end - 1];
        all &= queries_of[end - 1];  // none where the key is past the end
      }
      const Range tile{begin, end};
      EXPECT_MASK(is_set(window.queries_seeing_any(tile), any, mask.seqlen_q), mask, tile);
      EXPECT_MASK(is_set(window.queries_seeing_all(tile), begin == end ? 0 : all, mask.seqlen_q),
                  mask, tile);
    }
  }
}

// Laid over shorter sequences, a window keeps its bounds.
void check_over(int64_t left, int64_t right) {
  const WindowMask longest(kLongest, kLongest, left, right);
  for (int seqlen_q = 0; seqlen_q <= kLongest; ++seqlen_q) {
    for (int seqlen_k = 0; seqlen_k <= kLongest; ++seqlen_k) {
      const Mask mask{seqlen_q, seqlen_k, left, right};
      const WindowMask window = longest.over(seqlen_q, seqlen_k);
      for (int query = 0; query < seqlen_q; ++query) {
        for (int key = -1; key <= seqlen_k; ++key) {
          EXPECT_MASK(window.allows(query, key) == mask.visible(query, key), mask,
                      (Range{query, key}));
        }
      }
    }
  }
}

void check_every_small_mask() {
  std::vector<int64_t> bounds = {kHuge};
  for (int64_t bound = -1; bound <= kLongest + 2; ++bound) {
    bounds.push_back(bound);
  }
  for (const int64_t left : bounds) {
    for (const int64_t right : bounds) {
      for (int seqlen_q = 0; seqlen_q <= kLongest; ++seqlen_q) {
        for (int seqlen_k = 0; seqlen_k <= kLongest; ++seqlen_k) {
          check_rows_and_columns({seqlen_q, seqlen_k, left, right});
        }
      }
      check_over(left, right);
    }
  }
}

// The band of rows, and of columns, in 64 bits.
bool is_band(Range range, int64_t first, int64_t last, int64_t limit) {
  first = std::max<int64_t>(first, 0);
  last = std::min(last, limit - 1);
  if (first > last) {
    return 0 <= range.begin && range.begin == range.end && range.end <= limit;
  }
  return range.begin == first && range.end == last + 1;
}

void check_long_tile(const Mask& mask, Range tile) {
  const WindowMask window = mask.under_test();
  const int64_t offset = int64_t{mask.seqlen_k} - mask.seqlen_q;
  const int64_t left = mask.left < 0 ? kHuge : std::min(mask.left, kHuge);
  const int64_t right = mask.right < 0 ? kHuge : std::min(mask.right, kHuge);

  if (tile.begin < mask.seqlen_q) {
    const int64_t first = tile.begin;
    const int64_t last = std::min(tile.end, mask.seqlen_q) - 1;
    EXPECT_MASK(is_band(window.keys_seen_by_any(tile), first + offset - left, last + offset + right,
                        mask.seqlen_k),
                mask, tile);
    EXPECT_MASK(is_band(window.keys_seen_by_all(tile), last + offset - left, first + offset + right,
                        mask.seqlen_k),
                mask, tile);
    for (const int key : {0, mask.seqlen_k / 2, mask.seqlen_k - 1, mask.seqlen_k}) {
      EXPECT_MASK(window.allows(tile.begin, key) == mask.visible(tile.begin, key), mask, tile);
    }
  }
  if (tile.begin < mask.seqlen_k) {
    const int64_t first = tile.begin;
    const int64_t last = std::min(tile.end, mask.seqlen_k) - 1;
    EXPECT_MASK(is_band(window.queries_seeing_any(tile), first - offset - right,
                        last - offset + left, mask.seqlen_q),
                mask, tile);
    const int64_t limit = tile.end > mask.seqlen_k ? 0 : mask.seqlen_q;
    EXPECT_MASK(is_band(window.queries_seeing_all(tile), last - offset - right,
                        first - offset + left, limit),
                mask, tile);
  }
}

void check_longest_sequences() {
  const int longest = fa::kMaxSeqlen;
  const int lengths[] = {0, 1, 127, 128, 129, 65537, longest / 2, longest - 1, longest};
  const int64_t bounds[] = {
      -1, 0, 1, 1000, longest - 1, longest, int64_t{1} << 31, std::numeric_limits<int64_t>::max()};
  for (const int seqlen_q : lengths) {
    for (const int seqlen_k : lengths) {
      for (const int64_t left : bounds) {
        for (const int64_t right : bounds) {
          const Mask mask{seqlen_q, seqlen_k, left, right};
          for (const int begin : {0, 128, longest / 2, longest - 256, longest - 1}) {
            for (const int size : {1, 64, 256}) {
              check_long_tile(mask, {begin, begin + size});
            }
          }
        }
      }
    }
  }
}

// A kernel asks at compile time too.
constexpr WindowMask kCausal(2, 4, -1, 0);
static_assert(!kCausal.is_full() && kCausal.allows(0, 2) && !kCausal.allows(0, 3));
static_assert(kCausal.keys_seen_by_any({0, 64}).end == 4);

}  // namespace

int main() {
  check_every_small_mask();
  check_longest_sequences();
  return fa::test::report("common/test_window");
}
