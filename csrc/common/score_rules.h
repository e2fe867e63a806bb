// SPDX-License-Identifier: BSD-3-Clause
// What bears on a score beside the scale and the window. A query sees a key if the window or the
// prefix says so, both are of one document, and no mask hides it:
//   score = softmax_scale * q k^T + bias   where it is seen, and with the terms of score_terms.h.
// Queries and keys are numbered within their sequences.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "common/score_terms.h"
#include "common/types.h"
#include "common/window.h"

namespace fa {

// Broadcast to (batch, num_heads, seqlen_q, seqlen_k). Strides are in elements, and 0 where one
// element stands for all.
struct ScoreTensor {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t query_stride = 0;
  int64_t key_stride = 0;

  template <typename Element>
  FA_HOST_DEVICE Element* of_head(int64_t batch, int64_t head) const {
    return static_cast<Element*>(data) + batch * batch_stride + head * head_stride;
  }
  FA_HOST_DEVICE constexpr int64_t offset(int64_t query, int64_t key) const {
    return query * query_stride + key * key_stride;
  }
};

// A byte for each square of 2^block_log2 queries by as many keys; 0 hides its pairs.
struct KeepMask : ScoreTensor {
  int block_log2 = 0;
};

// All null: no rule, and the window alone decides.
struct ScoreRules {
  static constexpr int kMasks = 3;

  ScoreTensor bias;
  Dtype bias_dtype = Dtype::kFloat32;
  KeepMask masks[kMasks];                 // the first ones; those left over are null
  const int32_t* document_ids = nullptr;  // (batch, seqlen), of queries and keys alike
  int64_t document_stride = 0;            // of the batch
  const int32_t* prefix_lens = nullptr;   // (batch): how many first keys every query sees
  ScoreTerms terms;

  FA_HOST_DEVICE constexpr bool has_data_masks() const {
    return masks[0].data != nullptr || document_ids != nullptr;
  }
  FA_HOST_DEVICE constexpr bool any() const {
    return bias.data != nullptr || has_data_masks() || prefix_lens != nullptr || terms.any();
  }
};

// The window and the prefix of one sequence: what can be told without reading any data.
class PrefixWindow {
 public:
  FA_HOST_DEVICE constexpr PrefixWindow(const ScoreRules& rules, const WindowMask& window,
                                        int batch)
      : window_(window),
        prefix_(rules.prefix_lens == nullptr
                    ? 0
                    : min(max(rules.prefix_lens[batch], 0), window.seqlen_k())) {}
  // prefix: as prefix() tells it.
  FA_HOST_DEVICE constexpr PrefixWindow(const WindowMask& window, int prefix)
      : window_(window), prefix_(prefix) {}

  FA_HOST_DEVICE constexpr bool allows(int query, int key) const {
    return window_.allows(query, key) || (key >= 0 && key < prefix_);
  }

  // The smallest range that holds all keys that at least one of the queries sees.
  FA_HOST_DEVICE constexpr Range keys_seen_by_any(Range queries) const {
    const Range keys = window_.keys_seen_by_any(queries);
    if (prefix_ == 0 || queries.begin >= min(queries.end, window_.seqlen_q())) {
      return keys;
    }
    return {0, keys.empty() ? prefix_ : max(keys.end, prefix_)};
  }

  // The same of queries that see at least one of the keys.
  FA_HOST_DEVICE constexpr Range queries_seeing_any(Range keys) const {
    return max(keys.begin, 0) < min(keys.end, prefix_) ? Range{0, window_.seqlen_q()}
                                                       : window_.queries_seeing_any(keys);
  }

  // Whether some query of the range may see some of the keys: false only where none does.
  FA_HOST_DEVICE constexpr bool any(Range queries, Range keys) const {
    const Range seen = window_.keys_seen_by_any(queries);
    return max(keys.begin, seen.begin) < min(keys.end, seen.end) ||
           (keys.begin < prefix_ && queries.begin < window_.seqlen_q());
  }

  // Whether every query of the range, of those that exist, sees all of the keys.
  FA_HOST_DEVICE constexpr bool all(Range queries, Range keys) const {
    const Range seen = window_.keys_seen_by_all(queries);
    const int first = max(keys.begin, prefix_);
    return first >= keys.end || (seen.begin <= first && keys.end <= seen.end);
  }

  FA_HOST_DEVICE constexpr const WindowMask& window() const { return window_; }
  FA_HOST_DEVICE constexpr int prefix() const { return prefix_; }

 private:
  WindowMask window_;
  int prefix_;
};

// All rules of one head that hide keys.
class Visibility {
 public:
  FA_HOST_DEVICE constexpr Visibility(const ScoreRules& rules, const WindowMask& window, int batch,
                                      int head)
      : rules_(rules), window_(rules, window, batch), batch_(batch), head_(head) {}

  FA_HOST_DEVICE constexpr const PrefixWindow& window() const { return window_; }

  // For queries and keys that exist.
  FA_HOST_DEVICE bool allows(int query, int key) const {
    return window_.allows(query, key) && data_allow(query, key);
  }

  // What the masks and the documents say, for queries and keys that exist.
  FA_HOST_DEVICE bool data_allow(int query, int key) const {
    if (rules_.document_ids != nullptr) {
      const int32_t* ids = rules_.document_ids + batch_ * rules_.document_stride;
      if (ids[query] != ids[key]) {
        return false;
      }
    }
    for (const KeepMask& mask : rules_.masks) {
      if (mask.data != nullptr &&
          mask.of_head<const uint8_t>(
              batch_, head_)[mask.offset(query >> mask.block_log2, key >> mask.block_log2)] == 0) {
        return false;
      }
    }
    return true;
  }

 private:
  const ScoreRules& rules_;
  PrefixWindow window_;
  int64_t batch_;
  int64_t head_;
};

}  // namespace fa
