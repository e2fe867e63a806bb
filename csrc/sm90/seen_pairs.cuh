// SPDX-License-Identifier: BSD-3-Clause
// Which pairs of a tile are seen, as bits in shared memory: so that the warps that compute need not
// know why a pair is hidden, and spend little more than one instruction on each.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/tile_map.h"
#include "device/fragment.cuh"

namespace fa::sm90 {

// A bit for each pair of 64 queries and kKeys keys. Those who find out have words of every
// kWords-th key of a row, so that a lane with consecutive keys contributes one bit to each of them
// by a vote (as PairBits). Here the odd bits of a word have changed places with the even ones of
// the next, so that bits of neighbours lie side by side, and a thread that computes needs one word
// of a row.
template <int kKeys>
struct SeenPairs {
  static constexpr int kRows = 64;
  static constexpr int kWords = kKeys / ptx::kWarpSize;
  static_assert(kWords == 2 || kWords == 4);

  alignas(16) uint32_t words[kRows][kWords];

  // What is found of a row.
  FA_DEVICE void set(int row, const uint32_t (&found)[kWords]) {
    constexpr uint32_t kEven = 0x55555555;
    uint32_t swapped[kWords];
#pragma unroll
    for (int word = 0; word < kWords; word += 2) {
      swapped[word] = (found[word] & kEven) | (found[word + 1] & kEven) << 1;
      swapped[word + 1] = (found[word] >> 1 & kEven) | (found[word + 1] & ~kEven);
    }
    using Row = std::conditional_t<kWords == 4, uint4, uint2>;
    Row& s_row = *reinterpret_cast<Row*>(words[row]);
    if constexpr (kWords == 4) {
      s_row = {swapped[0], swapped[1], swapped[2], swapped[3]};
    } else {
      s_row = {swapped[0], swapped[1]};
    }
  }

  // Of a warp's 16 rows, of which the first is `row`: what a thread needs of its two.
  using OfThread = uint32_t[2];
  FA_DEVICE void load(OfThread& r_seen, int row) const {
    const int pair = ptx::lane_index() % 4;  // of the columns of a block
    const int word = kWords == 4 ? pair % 2 * 2 + pair / 2 : pair % 2;
    const int shift = kWords == 4 ? 0 : pair / 2 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row_of_lane = device::kBlockRows / 2 * half + ptx::lane_index() / 4;
      r_seen[half] = words[row + row_of_lane][word] >> shift;
    }
  }

  // Scores of hidden pairs become -inf.
  template <typename Scores>
  static FA_DEVICE void keep_seen(Scores& r_scores, const OfThread& r_seen) {
    constexpr int kBitsOfBlock = device::kBlockCols / kWords;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int block = 0; block < Scores::kColBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = r_scores.r[0][block][2 * half + i];
          score = (r_seen[half] & 1u << (block * kBitsOfBlock + i)) != 0 ? score : -INFINITY;
        }
      }
    }
  }
};

// Whether a mask is to be looked at for the pairs of a tile: not one of a byte for each pair, which
// is loaded ahead, and not one of blocks, for a tile lies in one block, which hides all of its
// pairs, so that it is not met, or none.
FA_DEVICE constexpr bool needs_pairs(const KeepMask& mask) {
  return mask.data != nullptr && mask.block_log2 == 0 && !PairBits::is_of(mask);
}
FA_DEVICE constexpr bool needs_pairs(const ScoreRules& rules) {
  return needs_pairs(rules.masks[0]) || needs_pairs(rules.masks[1]) || needs_pairs(rules.masks[2]);
}

// Those of 32 queries in the registers of a warp that finds them out: each lane has the words of
// one.
template <int kKeys>
class SeenPairsOfWarp {
 public:
  using Shared = SeenPairs<kKeys>;
  static constexpr int kWords = Shared::kWords;

  // Of queries from first_query on, which end at end_query, and keys from first_key on: what the
  // window and the prefix let see.
  FA_DEVICE SeenPairsOfWarp(const PrefixWindow& window, int first_query, int end_query,
                            int first_key)
      : first_query_(first_query),
        end_query_(end_query),
        first_key_(first_key),
        end_key_(window.window().seqlen_k()) {
    const int query = first_query + ptx::lane_index();
    if (window.all({first_query, first_query + ptx::kWarpSize}, {first_key, first_key + kKeys})) {
#pragma unroll
      for (uint32_t& word : words_) {
        word = query < end_query ? ~0u : 0;
      }
      return;
    }
    const int begin = query + window.window().lowest() - first_key;
    const int end = min(query + window.window().highest() + 1, end_key_) - first_key;
    const int end_of_prefix = window.prefix() - first_key;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const uint32_t seen =
          (bits_before(end, word) & ~bits_before(begin, word)) | bits_before(end_of_prefix, word);
      words_[word] = query < end_query ? seen : 0;
    }
  }

  // What the masks that need_pairs() let see.
  FA_DEVICE void keep_masks(const ScoreRules& rules, int64_t batch, int head) {
#pragma unroll 1
    for (int i = 0; i < ScoreRules::kMasks && rules.masks[i].data != nullptr; ++i) {
      const KeepMask& mask = rules.masks[i];
      if (needs_pairs(mask)) {
        keep_mask(mask, mask.of_head<const uint8_t>(batch, head));
      }
    }
  }

  FA_DEVICE uint32_t word(int index) const { return words_[index]; }

 private:
  // Whose bytes are not zero in a mask that has one for each query, or for each key.
  FA_DEVICE void keep_mask(const KeepMask& mask, const uint8_t* g_mask) {
    const bool sees = g_mask[query(ptx::lane_index()) * mask.query_stride] != 0;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const uint32_t seen = __ballot_sync(~0u, g_mask[key(word) * mask.key_stride] != 0);
      words_[word] &= mask.query_stride == 0 ? seen : sees ? ~0u : 0;
    }
  }

  // Of the keys of a word those before `key`.
  static FA_DEVICE uint32_t bits_before(int key, int word) {
    const int bits = (min(max(key, 0), kKeys) + kWords - 1 - word) / kWords;
    return __funnelshift_lc(~0u, 0u, bits);
  }

  // A key that exists, whose bit of a word is this lane's; and a query that exists.
  FA_DEVICE int key(int word) const {
    return min(first_key_ + kWords * ptx::lane_index() + word, end_key_ - 1);
  }
  FA_DEVICE int query(int row) const { return min(first_query_ + row, end_query_ - 1); }

  int first_query_;
  int end_query_;
  int first_key_;
  int end_key_;
  uint32_t words_[kWords];
};

// The documents of 64 queries, two for each lane, and of the keys whose bits of words are a lane's.
template <int kKeys>
struct DocumentsOfWarpgroup {
  static constexpr int kWords = SeenPairs<kKeys>::kWords;
  static constexpr int kHalves = SeenPairs<kKeys>::kRows / ptx::kWarpSize;

  int32_t of_queries[kHalves];
  int32_t of_keys[kWords];

  // g_ids: of the sequence, which has rows up to `end`.
  FA_DEVICE void load_queries(const int32_t* g_ids, int first, int end) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      of_queries[half] =
          __ldg(g_ids + min(first + half * ptx::kWarpSize + ptx::lane_index(), end - 1));
    }
  }
  FA_DEVICE void load_keys(const int32_t* g_ids, int first, int end) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      of_keys[word] = __ldg(g_ids + min(first + kWords * ptx::lane_index() + word, end - 1));
    }
  }
};

// Those of all 64 queries of a warpgroup: each lane has the words of two.
template <int kKeys>
class SeenPairsOfWarpgroup {
 public:
  using OfWarp = SeenPairsOfWarp<kKeys>;
  using Shared = SeenPairs<kKeys>;
  static constexpr int kWords = Shared::kWords;
  static constexpr int kHalves = Shared::kRows / ptx::kWarpSize;

  // find(half) has what is found of each 32 queries. Once in the code.
  template <typename Find>
  FA_DEVICE void find(Find&& find) {
#pragma unroll 1
    for (int half = 0; half < kHalves; ++half) {
      const OfWarp seen = find(half);
#pragma unroll
      for (int word = 0; word < kWords; ++word) {  // the half before it moves up
        words_[0][word] = words_[1][word];
        words_[1][word] = seen.word(word);
      }
    }
  }

  FA_DEVICE void see_all() {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        words_[half][word] = ~0u;
      }
    }
  }

  // The words of a mask (PairBits), those of the first query at g_words.
  FA_DEVICE void load(const uint32_t* g_words) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const Row row = __ldg(reinterpret_cast<const Row*>(g_words) + row_of(half));
      words_[half][0] = row.x;
      words_[half][1] = row.y;
      if constexpr (kWords == 4) {
        words_[half][2] = row.z;
        words_[half][3] = row.w;
      }
    }
  }

  // The same words from its bytes, where it has no bits: each lane reads its rows. g_first: of the
  // first of so many queries and keys that the tensors have.
  FA_DEVICE void load(const KeepMask& mask, const uint8_t* g_first, int queries, int keys) {
#pragma unroll 1
    for (int half = 0; half < kHalves; ++half) {
      const uint8_t* g_byte = g_first + row_of(half) * mask.query_stride;
      const int keys_of_row = row_of(half) < queries ? keys : 0;
#pragma unroll
      for (int word = 0; word < kWords; ++word) {  // the half before it moves up
        words_[0][word] = words_[1][word];
      }
#pragma unroll 1
      for (int key = 0; key < kKeys; key += kWords) {
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
          const bool is_seen = key + word < keys_of_row && __ldg(g_byte) != 0;
          words_[1][word] = words_[1][word] >> 1 | static_cast<uint32_t>(is_seen) << 31;
          g_byte += mask.key_stride;
        }
      }
    }
  }

  FA_DEVICE void keep(const SeenPairsOfWarpgroup& others) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        words_[half][word] &= others.words_[half][word];
      }
    }
  }

  // Those of one document. Queries of one id at a time: there are seldom more than two ids.
  FA_DEVICE void keep(const DocumentsOfWarpgroup<kKeys>& documents) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int32_t of_query = documents.of_queries[half];
#pragma unroll 1
      for (uint32_t left = ~0u; left != 0;) {
        const int32_t id = __shfl_sync(~0u, of_query, __ffs(static_cast<int>(left)) - 1);
        const bool is_same = of_query == id;
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
          const uint32_t same = __ballot_sync(~0u, documents.of_keys[word] == id);
          words_[half][word] &= is_same ? same : ~0u;
        }
        left &= ~__ballot_sync(~0u, is_same);
      }
    }
  }

  FA_DEVICE void store(Shared& s_pairs) const {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      s_pairs.set(row_of(half), words_[half]);
    }
  }

 private:
  static_assert(kHalves == 2);
  using Row = std::conditional_t<kWords == 4, uint4, uint2>;

  static FA_DEVICE int row_of(int half) { return half * ptx::kWarpSize + ptx::lane_index(); }

  uint32_t words_[kHalves][kWords];
};

}  // namespace fa::sm90
