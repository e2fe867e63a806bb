// SPDX-License-Identifier: BSD-3-Clause
// Which pairs of a mixed tile are seen: each lane finds it out for the scores that it holds.
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

// All rules, or some first and the others later: the data are read from global memory.
enum class SeenBy { kAll, kWindowAndWords, kData };

// Of a warp's 16 queries and some keys or, transposed, its 16 keys and some queries. A lane has a
// word for each of its two rows, and in it a bit for each of its columns, the pairs of a block of 8
// at equal distances. kCols: of the tile that the columns are some of, or all.
template <typename Scores, bool kTransposed, int kCols = Scores::kCols>
class SeenPairsOfLane {
 public:
  static constexpr int kWords = kCols / PairBits::kBitsOfWord;  // of a row

  // Queries and keys past the end are not seen, and the last one's memory is read in their place.
  // words: of the warp's first row, what stands for the mask that PairBits::is_of(), or null; the
  // columns begin at first_of_tile of those that the words tell of.
  template <SeenBy kBy = SeenBy::kAll>
  FA_DEVICE void find(const ScoreRules& rules, const PrefixWindow& window,
                      const ScoreOrigin& origin, const uint32_t* words, int first_of_tile = 0) {
    const int end_query = window.window().seqlen_q();
    const int end_key = window.window().seqlen_k();
    const int first_row = kTransposed ? origin.first_key : origin.first_query;
    const int first_col = kTransposed ? origin.first_query : origin.first_key;
    const int end_row = kTransposed ? end_key : end_query;
    const int end_col = kTransposed ? end_query : end_key;
    const auto col_at = [&](int block, int i) {
      return min(first_col + Scores::col(block, i), end_col - 1);
    };
    int rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + Scores::row(half);
      if (kBy != SeenBy::kData) {
        keep_in_window(half, window, row, first_col);
      }
      rows[half] = min(row, end_row - 1);
    }
    if (kBy != SeenBy::kData && words != nullptr) {
      keep_bits(words, first_of_tile);
    }
    if (kBy == SeenBy::kWindowAndWords) {
      return;
    }
    if (rules.document_ids != nullptr) {
      const int32_t* g_ids = rules.document_ids + origin.batch * rules.document_stride;
      const int32_t ids[2] = {__ldg(g_ids + rows[0]), __ldg(g_ids + rows[1])};
      each_col([&](int block, int i, int bit) {
        const int32_t id = __ldg(g_ids + col_at(block, i));
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
      const int64_t& row_stride = kTransposed ? mask.key_stride : mask.query_stride;
      const int64_t& col_stride = kTransposed ? mask.query_stride : mask.key_stride;
      const uint8_t* g_mask = mask.of_head<const uint8_t>(origin.batch, origin.head);
      const uint8_t* g_rows[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        g_rows[half] = g_mask + (rows[half] >> mask.block_log2) * row_stride;
      }
      if (col_stride == 0) {
        seen_[0] &= __ldg(g_rows[0]) != 0 ? ~0u : 0u;
        seen_[1] &= __ldg(g_rows[1]) != 0 ? ~0u : 0u;
        continue;
      }
      each_col([&](int block, int i, int bit) {
        const int64_t offset = (col_at(block, i) >> mask.block_log2) * col_stride;
        hide(0, bit, __ldg(g_rows[0] + offset) == 0);
        hide(1, bit, __ldg(g_rows[1] + offset) == 0);
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
  static constexpr int kBitsOfBlock = PairBits::kBitsOfWord * device::kBlockCols / kCols;
  static constexpr int kLargestTileLog2 = 7;  // of 128 queries or keys
  static_assert(Scores::kRowsPerThread == 2 && kBitsOfBlock >= 2 && Scores::kCols <= kCols);

  FA_DEVICE void keep_in_window(int half, const PrefixWindow& window, int row, int first_col) {
    const WindowMask& band = window.window();
    if constexpr (kTransposed) {
      const bool is_prefix = row < window.prefix();
      const int begin = is_prefix ? first_col : row - band.highest();
      const int end = is_prefix ? band.seqlen_q() : min(row - band.lowest() + 1, band.seqlen_q());
      seen_[half] = row < band.seqlen_k()
                        ? bits_before(end - first_col) & ~bits_before(begin - first_col)
                        : 0;
    } else {
      const int begin = row + band.lowest();
      const int end = min(row + band.highest() + 1, band.seqlen_k());
      const uint32_t in_window = bits_before(end - first_col) & ~bits_before(begin - first_col);
      seen_[half] =
          row < band.seqlen_q() ? in_window | bits_before(window.prefix() - first_col) : 0;
    }
  }

  // A lane's two columns of a block have a bit each of two words, at the same place.
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

  // Of the lane's columns those before `col` of the tile.
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
  FA_DEVICE void each_col(Visit&& visit) {
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
