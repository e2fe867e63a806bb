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

}  // namespace fa::device
