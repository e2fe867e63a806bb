// SPDX-License-Identifier: BSD-3-Clause
// Which pairs of a tile are seen, as bits in shared memory: so that the warps that compute need not
// know why a pair is hidden, and spend two instructions on each.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/score_rules.h"
#include "device/fragment.cuh"

namespace fa::sm90 {

// A bit for each pair of 64 queries and kKeys keys. Words have every kWords-th key of a row, so
// that a lane with consecutive keys contributes one bit to each of them by a vote.
template <int kKeys>
struct SeenPairs {
  static constexpr int kRows = 64;
  static constexpr int kWords = kKeys / ptx::kWarpSize;
  static_assert(kWords == 2 || kWords == 4);

  alignas(16) uint32_t words[kRows][kWords];

  // Of a warp's 16 rows, of which the first is `row`: scores of hidden pairs become -inf.
  template <typename Scores>
  FA_DEVICE void keep_seen(Scores& r_scores, int row) const {
    constexpr int kBitsOfBlock = device::kBlockCols / kWords;
    const int col = 2 * (ptx::lane_index() % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint2 pair =
          *reinterpret_cast<const uint2*>(&words[row + Scores::row(half)][col % kWords]);
      const uint32_t bits[2] = {pair.x >> (col / kWords), pair.y >> (col / kWords)};
#pragma unroll
      for (int block = 0; block < Scores::kColBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = r_scores.r[0][block][2 * half + i];
          score = (bits[i] & 1u << (block * kBitsOfBlock)) != 0 ? score : -INFINITY;
        }
      }
    }
  }
};

// Those of 32 queries in the registers of a warp that finds them out: each lane has the words of
// one.
template <int kKeys>
class SeenPairsOfWarp {
 public:
  using Shared = SeenPairs<kKeys>;

  // Of queries from first_query on, which end at end_query, and keys from first_key on: what the
  // window and the prefix let see.
  FA_DEVICE SeenPairsOfWarp(const PrefixWindow& window, int first_query, int end_query,
                            int first_key)
      : first_query_(first_query),
        end_query_(end_query),
        first_key_(first_key),
        end_key_(window.window().seqlen_k()) {
    const int query = first_query + ptx::lane_index();
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

  // Of one document.
  FA_DEVICE void keep_documents(const int32_t* g_ids) {
    int32_t of_keys[kWords];
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      of_keys[word] = __ldg(g_ids + key(word));
    }
    const int32_t of_query = __ldg(g_ids + query(ptx::lane_index()));
#pragma unroll 4
    for (int row = 0; row < ptx::kWarpSize; ++row) {
      const int32_t id = __shfl_sync(~0u, of_query, row);
      keep_row(row, [&](int word) { return id == of_keys[word]; });
    }
  }

  // Whose bytes in a mask are not zero.
  FA_DEVICE void keep_mask(const KeepMask& mask, int batch, int head) {
    const uint8_t* g_mask = mask.of_head<const uint8_t>(batch, head);
    const auto load = [&](int row) {
      const int64_t row_offset = (query(row) >> mask.block_log2) * mask.query_stride;
      Bytes bytes = 0;
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        const Bytes byte =
            __ldg(g_mask + row_offset + (key(word) >> mask.block_log2) * mask.key_stride);
        bytes |= byte << (kBitsOfByte * word);
      }
      return bytes;
    };
    if (mask.query_stride == 0) {
      const Bytes bytes = load(0);
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        words_[word] &= __ballot_sync(~0u, is_set(bytes, word));
      }
    } else if (is_dense(mask, g_mask)) {
      keep_row(g_mask + mask.offset(query(ptx::lane_index()), first_key_));
    } else {
      keep_rows(load);
    }
  }

  // row: of this lane.
  FA_DEVICE void store(Shared& s_pairs, int row) const {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      s_pairs.words[row][word] = words_[word];
    }
  }

 private:
  static constexpr int kWords = Shared::kWords;
  static constexpr int kRowsAtOnce = kWords / 2;  // for more there are no registers
  static constexpr int kBitsOfByte = 8;
  static constexpr int kUnit = sizeof(uint4);
  using Bytes = std::conditional_t<kWords == 4, uint32_t, uint16_t>;  // of a lane's keys

  static FA_DEVICE bool is_set(Bytes bytes, int word) {
    return (bytes >> (kBitsOfByte * word) & 0xFF) != 0;
  }

  // Of the keys of a word those before `key`.
  static FA_DEVICE uint32_t bits_before(int key, int word) {
    const int bits = (min(max(key, 0), kKeys) + kWords - 1 - word) / kWords;
    return static_cast<uint32_t>((uint64_t{1} << bits) - 1);
  }

  // A key that exists, whose bit of a word is this lane's; and a query that exists.
  FA_DEVICE int key(int word) const {
    return min(first_key_ + kWords * ptx::lane_index() + word, end_key_ - 1);
  }
  FA_DEVICE int query(int row) const { return min(first_query_ + row, end_query_ - 1); }

  // Whether a row's bytes may be read 16 at a time.
  FA_DEVICE bool is_dense(const KeepMask& mask, const uint8_t* g_mask) const {
    return mask.block_log2 == 0 && mask.key_stride == 1 && mask.query_stride % kUnit == 0 &&
           reinterpret_cast<uintptr_t>(g_mask) % kUnit == 0 && first_key_ + kKeys <= end_key_;
  }

  // Of this lane's row, whose bytes begin at g_row. Every other unit comes first, and with it the
  // one behind it into the cache.
  FA_DEVICE void keep_row(const uint8_t* g_row) {
    constexpr int kUnits = kKeys / kUnit;
    const uint4* g_units = reinterpret_cast<const uint4*>(g_row);
    uint32_t seen[kWords] = {};
#pragma unroll 1
    for (int first = 0; first < 2; ++first) {
      uint4 units[kUnits / 2];
#pragma unroll
      for (int i = 0; i < kUnits / 2; ++i) {
        units[i] = __ldg(g_units + 2 * i + first);
      }
      uint32_t of_units[kWords] = {};
#pragma unroll
      for (int i = 0; i < kUnits / 2; ++i) {
        const uint32_t quads[4] = {units[i].x, units[i].y, units[i].z, units[i].w};
#pragma unroll
        for (int quad = 0; quad < 4; ++quad) {
          add_quad(of_units, quads[quad], 2 * i * kUnit + 4 * quad);
        }
      }
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        seen[word] |= of_units[word] << (first * kUnit / kWords);
      }
    }
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      words_[word] &= seen[word];
    }
  }

  // The bits of four bytes, of the keys from `key` on.
  static FA_DEVICE void add_quad(uint32_t (&seen)[kWords], uint32_t bytes, int key) {
    const uint32_t signs = ((bytes & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | bytes;  // set where not zero
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int bit = (key + i) / kWords;
      const int sign = kBitsOfByte * i + kBitsOfByte - 1;
      seen[i % kWords] |= (sign >= bit ? signs >> (sign - bit) : signs << (bit - sign)) & 1u << bit;
    }
  }

  // Of a row those pairs that sees(word) says of this lane's keys.
  template <typename Sees>
  FA_DEVICE void keep_row(int row, Sees&& sees) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const uint32_t seen = __ballot_sync(~0u, sees(word));
      words_[word] &= row == ptx::lane_index() ? seen : ~0u;
    }
  }

  // Of all rows; load(row) has this lane's bytes of a row.
  template <typename Load>
  FA_DEVICE void keep_rows(Load&& load) {
#pragma unroll 1
    for (int first = 0; first < ptx::kWarpSize; first += kRowsAtOnce) {
      Bytes bytes[kRowsAtOnce];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        bytes[i] = load(first + i);
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        keep_row(first + i, [&](int word) { return is_set(bytes[i], word); });
      }
    }
  }

  int first_query_;
  int end_query_;
  int first_key_;
  int end_key_;
  uint32_t words_[kWords];
};

}  // namespace fa::sm90
