// SPDX-License-Identifier: BSD-3-Clause
// Masks of a warp's tile.
#pragma once

#include "common/window.h"
#include "device/fragment.cuh"

namespace fa::device {

FA_DEVICE constexpr bool covers(Range outer, Range inner) {
  return outer.begin <= inner.begin && inner.end <= outer.end;
}

// Sets the scores, (queries, keys), of keys that a query does not see to `masked`; the first is of
// (first_query, first_key). Queries past the end do not count. Three comparisons with constants per
// score and three registers, where a range per row would take two registers for each.
template <typename Scores>
FA_DEVICE void keep_visible(Scores& r_scores, const WindowMask& window, int first_query,
                            int first_key, float masked) {
  const int query = first_query + Scores::row(0);
  const int key = first_key + Scores::col(0, 0);
  const int above_lowest = key - query - window.lowest();
  const int below_highest = window.highest() - (key - query);
  const int before_end = window.seqlen_k() - key;
  r_scores.transform([&](float score, int row, int block, int i) {
    const int keys_on = Scores::first_col(block) + i % 2;
    const int on = keys_on - Scores::first_row(row);
    return above_lowest >= -on && below_highest >= on && before_end > keys_on ? score : masked;
  });
}

// A thread's columns of a row are bits of a word, two of each block: those before `col`, of a tile
// whose slices follow one another, or take turns with those of other warps. `first_col` is the
// thread's own.
template <typename Scores>
FA_DEVICE uint32_t bits_before(int col, int first_col) {
  static_assert(2 * Scores::kColBlocks <= 32);
  int bits;
  if constexpr (Scores::kSliceStride == 2 * kBlockCols) {
    const int cols = min(max(col - first_col, 0), Scores::kCols);
    bits = cols / kBlockCols * 2 + min(cols % kBlockCols, 2);
  } else {
    const int cols =
        min(max(col - first_col, 0), Scores::kCols / (2 * kBlockCols) * Scores::kSliceStride);
    const int in_slice = min(cols % Scores::kSliceStride, 2 * kBlockCols);
    bits =
        cols / Scores::kSliceStride * 4 + in_slice / kBlockCols * 2 + min(in_slice % kBlockCols, 2);
  }
  return static_cast<uint32_t>((uint64_t{1} << bits) - 1);
}

// Sets what lies outside a row's visible columns to `masked`, in the 16 rows of a warp:
// visible(row) of one of the thread's rows: one instruction per score.
template <typename Scores, typename Visible>
FA_DEVICE void keep_columns(Scores& r_scores, float masked, Visible&& visible) {
  static_assert(Scores::kRows == kBlockRows);
  const int first_col = Scores::col(0, 0);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const Range cols = visible(row);
    const uint32_t bits =
        bits_before<Scores>(cols.end, first_col) & ~bits_before<Scores>(cols.begin, first_col);
#pragma unroll
    for (int bit = 0; bit < 2 * Scores::kColBlocks; ++bit) {
      float& score = r_scores.r[0][bit / 2][2 * row + bit % 2];
      score = bits >> bit & 1 ? score : masked;
    }
  }
}

// keep_visible() for the 16 rows of a warp.
template <typename Scores>
FA_DEVICE void keep_visible_of_warp(Scores& r_scores, const WindowMask& window, int first_query,
                                    int first_key, float masked) {
  keep_columns(r_scores, masked, [&](int row) {
    const int query = first_query + Scores::row(row);
    return Range{query + window.lowest() - first_key,
                 min(query + window.highest() + 1, window.seqlen_k()) - first_key};
  });
}

// The same for scores (keys, queries).
template <typename Scores>
FA_DEVICE void keep_seeing_of_warp(Scores& r_scores, const WindowMask& window, int first_key,
                                   int first_query, float masked) {
  keep_columns(r_scores, masked, [&](int row) {
    const int key = first_key + Scores::row(row);
    return key < window.seqlen_k() ? Range{key - window.highest() - first_query,
                                           key - window.lowest() + 1 - first_query}
                                   : Range{0, 0};
  });
}

}  // namespace fa::device
