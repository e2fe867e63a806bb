// SPDX-License-Identifier: BSD-3-Clause
// Philox against the known answers of Random123, and dropout's decisions: which bits decide on a
// pair, how many are kept, and that heads, seeds and offsets have decisions of their own.
#include "common/dropout_mask.h"
#include "common/philox.h"

#include <cmath>
#include <cstdint>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "tests/support/check.h"

namespace {

using fa::Dropout;
using fa::DropoutOfHead;
using fa::PhiloxCounter;
using fa::PhiloxKey;

bool equal(PhiloxCounter a, PhiloxCounter b) {
  return a.x == b.x && a.y == b.y && a.z == b.z && a.w == b.w;
}

// Random123's kat_vectors.
void check_known_answers() {
  struct Known {
    PhiloxCounter counter;
    PhiloxKey key;
    PhiloxCounter after_7;
    PhiloxCounter after_10;
  };
  const uint32_t ones = 0xffffffff;
  const Known known[] = {
      {{0, 0, 0, 0},
       {0, 0},
       {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48},
       {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{ones, ones, ones, ones},
       {ones, ones},
       {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Known& one : known) {
    FA_EXPECT(equal(fa::philox<7>(one.counter, one.key), one.after_7));
    FA_EXPECT(equal(fa::philox<10>(one.counter, one.key), one.after_10));
  }
}

// The layout as the head of philox.h promises it, written down once more.
void check_patches() {
  const int64_t state[2] = {0x0123456789abcdef, 0x7edcba9876543210};
  const Dropout dropout = Dropout::of(0.3, state);
  const int heads = 3;
  for (const auto& [batch, head] : {std::pair(0, 0), std::pair(0, 2), std::pair(5, 1)}) {
    const DropoutOfHead of_head(dropout, batch, head, heads);
    const PhiloxKey key = {0x89abcdef, 0x01234567u ^ static_cast<uint32_t>(state[1] >> 34)};
    const auto w = static_cast<uint32_t>(state[1] >> 2);
    for (int i = 0; i < 48; ++i) {
      for (int j = 0; j < 96; ++j) {
        const PhiloxCounter counter = {static_cast<uint32_t>(i / 16 * 4 + i % 8 / 2),
                                       static_cast<uint32_t>(j / 16 * 4 + j % 8 / 2),
                                       static_cast<uint32_t>(batch * heads + head), w};
        const PhiloxCounter bits = fa::philox<7>(counter, key);
        const uint32_t words[] = {bits.x, bits.y, bits.z, bits.w};
        const int word = i / 8 % 2 + j / 8 % 2 * 2;
        const int byte = i % 2 * 2 + j % 2;
        const auto byte_of = [&](int other) { return words[other % 4] >> (8 * byte) & 0xff; };
        const uint32_t number = byte_of(word) << 8 | (byte_of(word + 1) ^ byte_of(word + 2));
        FA_EXPECT_EQ(of_head.keeps(i, j), number < dropout.threshold, "pair", i, j);
        FA_EXPECT_EQ(of_head.patch(i, j).number(word, byte), number, "pair", i, j);
        FA_EXPECT_EQ(fa::DropoutPatch::word_of(i, j), word, "pair", i, j);
        FA_EXPECT_EQ(fa::DropoutPatch::byte_of(i, j), byte, "pair", i, j);
      }
    }
  }
}

// Every pair of a head and a byte of its own.
void check_no_bits_are_used_twice() {
  std::set<std::tuple<int, int, int, int>> used;
  const int rows = 64;
  const int columns = 128;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      used.emplace(i / 16 * 4 + i % 8 / 2, j / 16 * 4 + j % 8 / 2, fa::DropoutPatch::word_of(i, j),
                   fa::DropoutPatch::byte_of(i, j));
    }
  }
  FA_EXPECT_EQ(used.size(), size_t{rows} * columns);
}

// Whatever two pairs' numbers are to be, as many words give them: of the bits at one place, two of
// each number, all 16 combinations of the words' bits make another combination of numbers' bits.
void check_two_pairs_are_independent() {
  for (int one = 0; one < 4; ++one) {
    for (int other = one + 1; other < 4; ++other) {
      std::set<std::pair<uint32_t, uint32_t>> numbers;
      for (uint32_t bits = 0; bits < 16; ++bits) {
        const fa::DropoutPatch patch({bits & 1, bits >> 1 & 1, bits >> 2 & 1, bits >> 3 & 1});
        numbers.emplace(patch.number(one, 0), patch.number(other, 0));
      }
      FA_EXPECT_EQ(numbers.size(), size_t{16}, "words", one, other);
    }
  }
}

void check_thresholds() {
  const int64_t state[2] = {};
  for (const double p : {0.0, 1e-6, 0.1, 0.17, 0.5, 0.9, 1 - 1e-6, 1.0}) {
    const Dropout dropout = Dropout::of(p, state);
    const double kept = dropout.threshold / 65536.0;
    FA_EXPECT(std::abs(kept - (1 - p)) <= 0.5 / 65536, "p", p);
    if (dropout.threshold == 0) {
      FA_EXPECT_EQ(dropout.scale, 0.0);
    } else {
      FA_EXPECT(std::abs(dropout.scale * kept - 1) < 1e-15, "p", p);
    }
  }
  FA_EXPECT_EQ(Dropout::of(0.0, state).threshold, Dropout::kAll);
  FA_EXPECT_EQ(Dropout::of(1.0, state).threshold, 0u);
  FA_EXPECT(!Dropout{}.any() && Dropout::of(0.5, state).any());
}

// Masks of (rows, columns) as bytes, through DropoutMask.
constexpr int kRows = 256;
constexpr int kColumns = 512;

std::vector<uint8_t> mask_of(double p, int64_t seed, int64_t offset, int batch, int heads) {
  const int64_t state[2] = {seed, offset};
  std::vector<uint8_t> kept(size_t{kRows} * kColumns * batch * heads, 2);
  const fa::DropoutMask mask = {Dropout::of(p, state), batch, heads, kRows, kColumns, kept.data()};
  for (int64_t row = 0; row < mask.rows(); ++row) {
    mask.fill_row(row, 0, 2);
    mask.fill_row(row, 1, 2);
  }
  return kept;
}

// That so many of n bits of this probability are set, within 4 standard deviations.
void check_rate(const uint8_t* kept, int64_t n, double probability, const char* what) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    FA_EXPECT(kept[i] <= 1, what, i);
    count += kept[i];
  }
  const double sigma = std::sqrt(n * probability * (1 - probability));
  FA_EXPECT(std::abs(count - n * probability) <= 4 * sigma, what, count, "of", n, "p", probability);
}

void check_rates_and_independence() {
  const int batch = 2;
  const int heads = 3;
  const int64_t size = int64_t{kRows} * kColumns;
  for (const double p : {0.1, 0.17, 0.5, 0.9}) {
    const double keep = Dropout::of(p, nullptr).threshold / 65536.0;
    const std::vector<uint8_t> kept = mask_of(p, 42, 7, batch, heads);
    check_rate(kept.data(), size * batch * heads, keep, "all");
    // What two masks of independent decisions agree to keep: heads, batch entries, seeds, offsets,
    // and neighbours within one.
    const auto check_pair = [&](const uint8_t* a, const uint8_t* b, int64_t n, const char* what) {
      std::vector<uint8_t> both(n);
      for (int64_t i = 0; i < n; ++i) {
        both[i] = a[i] & b[i];
      }
      check_rate(both.data(), n, keep * keep, what);
    };
    check_pair(&kept[0], &kept[size], size, "heads");
    check_pair(&kept[0], &kept[size * heads], size, "batch entries");
    // The smallest change of each part of the state: offsets count in fours.
    for (const auto& [seed, offset] :
         {std::pair(int64_t{43}, int64_t{7}),
          std::pair(int64_t{42} + (int64_t{1} << 32), int64_t{7}),
          std::pair(int64_t{42}, int64_t{11}), std::pair(int64_t{42}, 7 + (int64_t{1} << 34))}) {
      const std::vector<uint8_t> other = mask_of(p, seed, offset, 1, 1);
      check_pair(kept.data(), other.data(), size, "states");
    }
    for (const int distance : {1, 8, 16, 32, kColumns, 8 * kColumns, 16 * kColumns}) {
      check_pair(&kept[0], &kept[distance], size - distance, "neighbours");
    }
  }
}

}  // namespace

int main() {
  check_known_answers();
  check_patches();
  check_no_bits_are_used_twice();
  check_two_pairs_are_independent();
  check_thresholds();
  check_rates_and_independence();
  return fa::test::report("common/test_philox");
}
