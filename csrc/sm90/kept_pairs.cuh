// SPDX-License-Identifier: BSD-3-Clause
// Which pairs dropout keeps (common/philox.h), as those who compute need it. Two of its 16-bit
// values are compared at a time.
#pragma once

#include "common/philox.h"
#include "device/fragment.cuh"

namespace fa::sm90 {

// Of what is kept or not, two pairs of a word of `values`: the topmost bit of each half.
FA_DEVICE uint32_t kept_halves(uint32_t values, uint32_t threshold) {
  // The carry of threshold + ~value, of 17 bits, of which half is kept.
  const uint32_t thresholds = threshold * 0x10001;
  return (~values & thresholds) + (((~values ^ thresholds) & 0xFFFEFFFE) >> 1);
}

// All bits of each half become its topmost one.
FA_DEVICE uint32_t spread_halves(uint32_t topmost) {
  return ptx::permute_bytes<0xBB99>(topmost, topmost);
}

// The same half of two words as one word.
FA_DEVICE uint32_t join_halves(uint32_t first, uint32_t second, int half) {
  return __byte_perm(first, second, half == 0 ? 0x5410 : 0x7632);
}

// Probabilities of a warp's 16 queries that are dropped become 0. The queries begin at a multiple
// of 16, the keys of 32.
template <typename Element, int kKeys>
FA_DEVICE void drop(device::OperandA<Element, device::kBlockRows, kKeys>& r_p,
                    const DropoutOfHead& dropout, int first_query, int first_key) {
  constexpr int kKeysOfPatch = 32;
  static_assert(kKeys % kKeysOfPatch == 0);
  const int query = first_query + ptx::lane_index() / 4;
  const int key = first_key + ptx::lane_index() % 4 * 2;
#pragma unroll
  for (int keys = 0; keys < kKeys; keys += kKeysOfPatch) {
    const PhiloxCounter left = dropout.patch(query, key + keys).bits;
    const PhiloxCounter right = dropout.patch(query, key + keys + 1).bits;
    const uint32_t lefts[4] = {left.x, left.y, left.z, left.w};
    const uint32_t rights[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int block = keys / device::kBlockCols + i;
        const int word = 2 * row + i / 2;
        const uint32_t values = join_halves(lefts[word], rights[word], i % 2);
        r_p.r[0][block / 2][block % 2 * 2 + row] &=
            spread_halves(kept_halves(values, dropout.threshold()));
      }
    }
  }
}

// Of a warp's 16 keys and some queries, transposed scores: a bit for each of a thread's pairs. Both
// begin at multiples of 16.
template <typename Scores>
class KeptQueries {
 public:
  FA_DEVICE void find(const DropoutOfHead& dropout, int first_query, int first_key) {
    const int query = first_query + ptx::lane_index() % 4 * 2;
    const int key = first_key + ptx::lane_index() / 4;
    const bool is_second = first_key / device::kBlockRows % 2 != 0;  // half of a patch's keys
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      uint32_t kept = 0;
#pragma unroll 2  // few calls' registers at a time
      for (int queries = 0; queries < kQueriesOfWord; queries += device::kBlockRows) {
        const int first = query + word * kQueriesOfWord + queries;
        const PhiloxCounter left = dropout.patch(first, key).bits;
        const PhiloxCounter right = dropout.patch(first + 1, key).bits;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t of_left = is_second   ? half == 0 ? left.y : left.w
                                   : half == 0 ? left.x
                                               : left.z;
          const uint32_t of_right = is_second   ? half == 0 ? right.y : right.w
                                    : half == 0 ? right.x
                                                : right.z;
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            const uint32_t values = join_halves(of_left, of_right, row);
            kept = kept >> 1 | (kept_halves(values, dropout.threshold()) & kTopmost);
          }
        }
      }
      kept_[word] = kept;
    }
  }

  // Of what is kept each value is multiplied by `scale`; others become 0.
  FA_DEVICE void keep(Scores& r_values, float scale) const {
    r_values.transform([&](float value, int row, int block, int i) {
      const uint32_t bit = 1u << (bit_of(block, row) + i % 2 * kPairsOfWord);
      return (kept_[block / kBlocksOfWord] & bit) != 0 ? value * scale : 0.0f;
    });
  }

 private:
  static constexpr uint32_t kTopmost = 0x80008000;
  // A word has the left element of 16 pairs of neighbouring queries, and then the right ones.
  static constexpr int kPairsOfWord = 16;
  static constexpr int kBlocksOfWord = kPairsOfWord / 2;
  static constexpr int kQueriesOfWord = kBlocksOfWord * device::kBlockCols;
  static constexpr int kWords = Scores::kCols / kQueriesOfWord;
  static_assert(Scores::kRowBlocks == 1 && Scores::kCols % kQueriesOfWord == 0);

  static constexpr FA_DEVICE int bit_of(int block, int row) {
    return block % kBlocksOfWord * 2 + row;
  }

  uint32_t kept_[kWords];
};

}  // namespace fa::sm90
