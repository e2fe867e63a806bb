// SPDX-License-Identifier: BSD-3-Clause
// Which probabilities dropout keeps: a function of (seed, offset), the head of the batch entry and
// the pair (query, key), both numbered within their sequences. Tiles, families, passes and threads
// have no say in it.
//
// Bits come from Philox4x32 (Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as
// 1, 2, 3", 2011). The 128 bits of one call are a patch of 4 x 4 pairs,
//   queries {i, i + 1, i + 8, i + 9} by keys {j, j + 1, j + 8, j + 9},
//   i % 16 < 8, j % 16 < 8, i and j even,
// of which a thread has half in an mma operand of 16 x 16, and its neighbour in the next row the
// other half; of the transposed operand, too.
//
// A pair has a number of 16 bits: a byte of its own above the exclusive or of those that two other
// pairs have. Any two pairs' numbers are independent. Those of three are not, but that shows only
// if one's own byte is that of the threshold.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fa {

struct PhiloxCounter {
  uint32_t x, y, z, w;
};

struct PhiloxKey {
  uint32_t x, y;
};

// Seven rounds pass every test of BigCrush (section 5.2 there); ten are its authors' default.
inline constexpr int kDropoutRounds = 7;

// Two words' product of 64 bits. Kernels of GPUs have an instruction for it (ptx::MultiplyWide),
// which the compiler does not find.
struct Multiply {
  FA_HOST_DEVICE constexpr uint64_t operator()(uint32_t x, uint32_t y) const {
    return uint64_t{x} * y;
  }
};

template <int kRounds, typename Product = Multiply>
FA_HOST_DEVICE constexpr PhiloxCounter philox(PhiloxCounter counter, PhiloxKey key) {
  constexpr uint32_t kMultiplierX = 0xD2511F53;
  constexpr uint32_t kMultiplierZ = 0xCD9E8D57;
  constexpr uint32_t kWeylX = 0x9E3779B9;  // the golden ratio
  constexpr uint32_t kWeylY = 0xBB67AE85;  // sqrt(3) - 1
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t x = Product{}(kMultiplierX, counter.x);
    const uint64_t z = Product{}(kMultiplierZ, counter.z);
    counter = {static_cast<uint32_t>(z >> 32) ^ counter.y ^ key.x, static_cast<uint32_t>(z),
               static_cast<uint32_t>(x >> 32) ^ counter.w ^ key.y, static_cast<uint32_t>(x)};
    key = {key.x + kWeylX, key.y + kWeylY};
  }
  return counter;
}

// What a call's dropout is, as kernels are given it.
struct Dropout {
  static constexpr uint32_t kAll = 1 << 16;

  const int64_t* rng_state = nullptr;  // (2): seed and offset; null: no dropout
  uint32_t threshold = kAll;           // of kAll equally likely values so many are kept
  double scale = 1;                    // of what is kept: 1 / P(keep), 0 where nothing is

  // dropout_p: in [0, 1]. P(keep) is 1 - dropout_p, rounded to a multiple of 1 / kAll.
  static constexpr Dropout of(double dropout_p, const int64_t* rng_state) {
    const auto threshold = static_cast<uint32_t>((1.0 - dropout_p) * kAll + 0.5);
    return {rng_state, threshold, threshold == 0 ? 0 : static_cast<double>(kAll) / threshold};
  }

  // Whether anything may be dropped: not where dropout_p is too small for the bits.
  FA_HOST_DEVICE constexpr bool any() const { return rng_state != nullptr && threshold != kAll; }
};

// The numbers of a patch's pairs. A word has the bytes of two neighbouring queries by two
// neighbouring keys, each query's together; word 1 those of queries 8 further than word 0, words 2
// and 3 those of keys 8 further.
struct DropoutPatch {
  uint32_t words[4];

  FA_HOST_DEVICE constexpr explicit DropoutPatch(const PhiloxCounter& bits)
      : words{bits.x, bits.y, bits.z, bits.w} {}

  // The lower bytes of the numbers whose upper ones are a word's. word: a constant, so that words
  // stay in registers.
  FA_HOST_DEVICE constexpr uint32_t lower(int word) const {
    return words[(word + 1) % 4] ^ words[(word + 2) % 4];
  }

  FA_HOST_DEVICE constexpr uint32_t number(int word, int byte) const {
    const int shift = 8 * byte;
    return (words[word] >> shift & 0xFF) << 8 | (lower(word) >> shift & 0xFF);
  }

  static FA_HOST_DEVICE constexpr int word_of(int query, int key) {
    return query / 8 % 2 + key / 8 % 2 * 2;
  }
  static FA_HOST_DEVICE constexpr int byte_of(int query, int key) {
    return query % 2 * 2 + key % 2;
  }
};

// Of one head of a batch entry. Reads the state, from device memory on a GPU.
class DropoutOfHead {
 public:
  FA_HOST_DEVICE constexpr DropoutOfHead(const Dropout& dropout, int batch, int head, int num_heads)
      : threshold_(dropout.threshold),
        head_(static_cast<uint32_t>(batch) * static_cast<uint32_t>(num_heads) +
              static_cast<uint32_t>(head)),
        offset_(static_cast<uint32_t>(static_cast<uint64_t>(dropout.rng_state[1]) >> 2)),
        key_{static_cast<uint32_t>(dropout.rng_state[0]),
             static_cast<uint32_t>(static_cast<uint64_t>(dropout.rng_state[0]) >> 32) ^
                 static_cast<uint32_t>(static_cast<uint64_t>(dropout.rng_state[1]) >> 34)} {}

  // The patch that a pair is of.
  template <typename Product = Multiply>
  FA_HOST_DEVICE constexpr DropoutPatch patch(int query, int key) const {
    return DropoutPatch(philox<kDropoutRounds, Product>(
        {index_of_patch(query), index_of_patch(key), head_, offset_}, key_));
  }

  FA_HOST_DEVICE constexpr uint32_t threshold() const { return threshold_; }

  FA_HOST_DEVICE constexpr bool keeps(uint32_t number) const { return number < threshold_; }
  FA_HOST_DEVICE constexpr bool keeps(int query, int key) const {
    const DropoutPatch of_pair = patch(query, key);
    uint32_t number = 0;
    for (int word = 0; word < 4; ++word) {
      if (word == DropoutPatch::word_of(query, key)) {
        number = of_pair.number(word, DropoutPatch::byte_of(query, key));
      }
    }
    return keeps(number);
  }

 private:
  static FA_HOST_DEVICE constexpr uint32_t index_of_patch(int row) {
    return static_cast<uint32_t>(row / 16 * 4 + row % 8 / 2);
  }

  uint32_t threshold_;
  uint32_t head_;  // counted through the batch
  uint32_t offset_;
  PhiloxKey key_;
};

}  // namespace fa
