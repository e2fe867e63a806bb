// SPDX-License-Identifier: BSD-3-Clause
// common/score_rules.h for a warp's tile of scores (queries, keys), the first of (first_query,
// first_key). Tiles may reach past the ends of their sequence: what is there is hidden, and the
// last query's or key's memory is read in its place.
#pragma once

#include "common/tile_map.h"
#include "device/mask.cuh"
#include "device/score_terms.cuh"

namespace fa::device {

// Which of a thread's columns each of its rows sees, as bits: see bits_before().
template <typename Scores>
using SeenColumns = uint32_t[Scores::kRowsPerThread];

template <typename Scores>
FA_DEVICE void keep_seen(Scores& r_scores, const SeenColumns<Scores>& seen, float hidden) {
  r_scores.transform([&](float score, int row, int block, int i) {
    return seen[row] >> (2 * block + i % 2) & 1 ? score : hidden;
  });
}

// Of one head of one sequence that has queries and keys.
class HeadRules {
 public:
  FA_DEVICE HeadRules(const ScoreRules& rules, const PrefixWindow& window, int batch, int head)
      : rules_(rules), window_(window), batch_(batch), head_(head) {}

  FA_DEVICE const WindowMask& window() const { return window_.window(); }

  // Each product of a query and a key becomes a score. visit_tanh() is told what cap_scores()
  // tells, where there is a softcap.
  template <typename Scores>
  FA_DEVICE void finish_scores(Scores& r_scores, float softmax_scale, int first_query,
                               int first_key) const {
    finish_scores(r_scores, softmax_scale, first_query, first_key, [](float, int, int, int) {});
  }
  template <typename Scores, typename Visit>
  FA_DEVICE void finish_scores(Scores& r_scores, float softmax_scale, int first_query,
                               int first_key, Visit&& visit_tanh) const {
    const ScoreTerms& terms = rules_.terms;
    float scale = softmax_scale;
    if (terms.softcap != 0) {
      cap_scores(r_scores, scale, static_cast<float>(terms.softcap), visit_tanh);
      scale = 1.0f;
    }
    if (rules_.bias.data == nullptr) {
      r_scores.scale(scale);
    } else if (rules_.bias_dtype == Dtype::kFloat32) {
      add_bias<float>(r_scores, scale, first_query, first_key, [](float bias) { return bias; });
    } else {
      const bool is_half = rules_.bias_dtype == Dtype::kFloat16;
      add_bias<uint16_t>(r_scores, scale, first_query, first_key, [&](uint16_t bias) {
        return is_half ? __half2float(__ushort_as_half(bias))
                       : __uint_as_float(static_cast<uint32_t>(bias) << 16);
      });
    }
    if (terms.alibi.data != nullptr) {
      add_alibi(r_scores, __ldg(&terms.alibi.at<const float>(batch_, head_)), window_.window(),
                first_query, first_key);
    }
  }

  template <typename Scores>
  FA_DEVICE void find_seen(SeenColumns<Scores>& seen, int first_query, int first_key) const {
    find_in_window<Scores>(seen, first_query, first_key);
    if (rules_.document_ids != nullptr) {
      const int32_t* g_ids = rules_.document_ids + batch_ * rules_.document_stride;
      int32_t ids[Scores::kRowsPerThread];
      each_row<Scores>(first_query, [&](int row, int query) { ids[row] = __ldg(g_ids + query); });
      each_col<Scores>(first_key, [&](int bit, int key) {
        const int32_t id = __ldg(g_ids + key);
        each_row<Scores>(first_query, [&](int row, int) {
          seen[row] &= ~(static_cast<uint32_t>(id != ids[row]) << bit);
        });
      });
    }
#pragma unroll 1
    for (const KeepMask& mask : rules_.masks) {
      if (mask.data == nullptr) {
        break;
      }
      const uint8_t* g_rows[Scores::kRowsPerThread];
      each_row<Scores>(first_query, [&](int row, int query) {
        g_rows[row] = mask.of_head<const uint8_t>(batch_, head_) +
                      (query >> mask.block_log2) * mask.query_stride;
      });
      each_col<Scores>(first_key, [&](int bit, int key) {
        const int64_t offset = (key >> mask.block_log2) * mask.key_stride;
        each_row<Scores>(first_query, [&](int row, int) {
          seen[row] &= ~(static_cast<uint32_t>(__ldg(g_rows[row] + offset) == 0) << bit);
        });
      });
    }
  }

 private:
  template <typename Scores>
  FA_DEVICE void find_in_window(SeenColumns<Scores>& seen, int first_query, int first_key) const {
    const WindowMask& window = window_.window();
    const int first_col = Scores::col(0, 0);
    const auto keys_before = [&](int key) {
      return bits_before<Scores>(min(key, window.seqlen_k()) - first_key, first_col);
    };
#pragma unroll
    for (int row = 0; row < Scores::kRowsPerThread; ++row) {
      const int query = first_query + Scores::row(row);
      const uint32_t keys =
          (keys_before(query + window.highest() + 1) & ~keys_before(query + window.lowest())) |
          keys_before(window_.prefix());
      seen[row] = query < window.seqlen_q() ? keys : 0;
    }
  }

  // Calls visit(row_of_thread, query) or visit(bit, key) for what exists.
  template <typename Scores, typename Visit>
  FA_DEVICE void each_row(int first_query, Visit&& visit) const {
#pragma unroll
    for (int row = 0; row < Scores::kRowsPerThread; ++row) {
      visit(row, min(first_query + Scores::row(row), window_.window().seqlen_q() - 1));
    }
  }
  template <typename Scores, typename Visit>
  FA_DEVICE void each_col(int first_key, Visit&& visit) const {
#pragma unroll 4
    for (int bit = 0; bit < 2 * Scores::kColBlocks; ++bit) {
      visit(bit, key_at<Scores>(first_key, bit / 2, bit));
    }
  }
  template <typename Scores>
  FA_DEVICE int key_at(int first_key, int block, int i) const {
    return min(first_key + Scores::col(block, i), window_.window().seqlen_k() - 1);
  }

  template <typename Element, typename Scores, typename ToFloat>
  FA_DEVICE void add_bias(Scores& r_scores, float scale, int first_query, int first_key,
                          ToFloat&& to_float) const {
    const ScoreTensor& bias = rules_.bias;
    const Element* g_rows[Scores::kRowsPerThread];
    each_row<Scores>(first_query, [&](int row, int query) {
      g_rows[row] = bias.of_head<const Element>(batch_, head_) + query * bias.query_stride;
    });
    r_scores.transform([&](float score, int row, int block, int i) {
      const int64_t offset = key_at<Scores>(first_key, block, i) * bias.key_stride;
      return fmaf(score, scale, to_float(__ldg(g_rows[row] + offset)));
    });
  }

  const ScoreRules& rules_;
  PrefixWindow window_;
  int batch_;
  int head_;
};

}  // namespace fa::device
