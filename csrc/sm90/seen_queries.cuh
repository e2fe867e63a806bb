// SPDX-License-Identifier: BSD-3-Clause
// Which pairs of a mixed tile are seen, of transposed scores, (keys, queries): each lane finds it
// out for the scores that it holds.
#pragma once

#include "common/tile_map.h"
#include "device/fragment.cuh"

namespace fa::sm90 {

// Where a warp's scores begin.
struct ScoreOrigin {
  int batch;
  int head;
  int first_query;
  int first_key;
};

// Of a warp's 16 keys. A lane has a word for each of its two keys, and in it a bit for each of its
// queries, the pairs of a block of 8 at equal distances. kQueries: of the tile that the queries are
// some of, or all.
template <typename Scores, int kQueries = Scores::kCols>
class SeenQueries {
 public:
  static constexpr int kWords = kQueries / PairBits::kBitsOfWord;  // of a key

  // Of all rules. Queries and keys past the end are not seen, and the last one's memory is read in
  // their place. words: of the warp's first key, what stands for the mask that PairBits::is_of(),
  // or null; the queries begin at first_of_tile of those that the words tell of.
  FA_DEVICE void find(const ScoreRules& rules, const PrefixWindow& window,
                      const ScoreOrigin& origin, const uint32_t* words, int first_of_tile = 0) {
    const int end_query = window.window().seqlen_q();
    const int end_key = window.window().seqlen_k();
    const auto query_at = [&](int block, int i) {
      return min(origin.first_query + Scores::col(block, i), end_query - 1);
    };
    int keys[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int key = origin.first_key + Scores::row(row);
      keep_in_window(row, window, key, origin.first_query);
      keys[row] = min(key, end_key - 1);
    }
    if (words != nullptr) {
      keep_bits(words, first_of_tile);
    }
    if (rules.document_ids != nullptr) {
      const int32_t* g_ids = rules.document_ids + origin.batch * rules.document_stride;
      const int32_t ids[2] = {__ldg(g_ids + keys[0]), __ldg(g_ids + keys[1])};
      each_query([&](int block, int i, int bit) {
        const int32_t id = __ldg(g_ids + query_at(block, i));
        hide(0, bit, id != ids[0]);
        hide(1, bit, id != ids[1]);
      });
    }
#pragma unroll 1
    for (const KeepMask& mask : rules.masks) {
      if (mask.data == nullptr) {
        break;
      }
      if (mask.block_log2 >= kLargestTileLog2) {
        continue;  // one byte stands for the tile, and hidden tiles are not computed
      }
      if (words != nullptr && PairBits::is_of(mask)) {
        continue;
      }
      const uint8_t* g_mask = mask.of_head<const uint8_t>(origin.batch, origin.head);
      const uint8_t* g_keys[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        g_keys[row] = g_mask + (keys[row] >> mask.block_log2) * mask.key_stride;
      }
      if (mask.query_stride == 0) {
        seen_[0] &= __ldg(g_keys[0]) != 0 ? ~0u : 0u;
        seen_[1] &= __ldg(g_keys[1]) != 0 ? ~0u : 0u;
        continue;
      }
      each_query([&](int block, int i, int bit) {
        const int64_t offset = (query_at(block, i) >> mask.block_log2) * mask.query_stride;
        hide(0, bit, __ldg(g_keys[0] + offset) == 0);
        hide(1, bit, __ldg(g_keys[1] + offset) == 0);
      });
    }
  }

  // Values of hidden pairs become 0.
  FA_DEVICE void keep(Scores& r_values) const {
    r_values.transform([&](float value, int row, int block, int i) {
      return (seen_[row] & 1u << (kBitsOfBlock * block + i % 2)) != 0 ? value : 0.0f;
    });
  }

 private:
  static constexpr int kBitsOfBlock = 32 * device::kBlockCols / kQueries;
  static constexpr int kLargestTileLog2 = 7;  // of 128 queries or keys
  static_assert(Scores::kRowsPerThread == 2 && kBitsOfBlock >= 2 && Scores::kCols <= kQueries);

  FA_DEVICE void keep_in_window(int row, const PrefixWindow& window, int key, int first_query) {
    const WindowMask& band = window.window();
    const bool is_prefix = key < window.prefix();
    const int begin = is_prefix ? first_query : key - band.highest();
    const int end = is_prefix ? band.seqlen_q() : min(key - band.lowest() + 1, band.seqlen_q());
    seen_[row] = key < band.seqlen_k()
                     ? bits_before(end - first_query) & ~bits_before(begin - first_query)
                     : 0;
  }

  // A lane's two queries of a block have a bit each of two words, at the same place.
  FA_DEVICE void keep_bits(const uint32_t* words, int first_of_tile) {
    constexpr uint32_t kFirstOfEach = ~0u / ((1u << kBitsOfBlock) - 1);
    const int col = Scores::col(0, 0);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const uint2 pair =
          *reinterpret_cast<const uint2*>(words + Scores::row(row) * kWords + col % kWords);
      const int shift = (first_of_tile + col) / kWords;
      const uint32_t first = pair.x >> shift & kFirstOfEach;
      const uint32_t second = pair.y >> shift & kFirstOfEach;
      seen_[row] &= first | second << 1;
    }
  }

  // Of the lane's queries those before `col` of the tile.
  static FA_DEVICE uint32_t bits_before(int col) {
    const int cols = min(max(col - Scores::col(0, 0), 0), Scores::kCols);
    const int bits = cols / device::kBlockCols * kBitsOfBlock + min(cols % device::kBlockCols, 2);
    return static_cast<uint32_t>((uint64_t{1} << bits) - 1);
  }

  FA_DEVICE void hide(int row, int bit, bool is_hidden) {
    seen_[row] &= ~(static_cast<uint32_t>(is_hidden) << bit);
  }

  // Calls visit(block, i, bit).
  template <typename Visit>
  FA_DEVICE void each_query(Visit&& visit) {
#pragma unroll 2
    for (int block = 0; block < Scores::kColBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        visit(block, i, kBitsOfBlock * block + i);
      }
    }
  }

  uint32_t seen_[2];
};

}  // namespace fa::sm90
