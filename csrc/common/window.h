// SPDX-License-Identifier: BSD-3-Clause
// Which keys a query sees. Full, causal and sliding-window attention are one rule, aligned at the
// bottom right, with offset = seqlen_k - seqlen_q:
//   query i sees key j  iff  i + offset - left <= j <= i + offset + right
// Tiles ask for two ranges: the keys that any of their rows sees, which bound the loop, and the
// keys that all of their rows see, which need no mask. A tile may reach past the end of its
// sequence: queries there do not count, and keys there are seen by no query.
#pragma once

#include "common/math.h"
#include "common/types.h"

namespace fa {

// Half-open [begin, end); empty ranges have begin == end.
struct Range {
  int begin;
  int end;
  FA_HOST_DEVICE constexpr bool empty() const { return begin >= end; }
  FA_HOST_DEVICE constexpr int size() const { return empty() ? 0 : end - begin; }
};

// The longest sequence: sums of two lengths and a tile stay far inside 32 bits.
inline constexpr int kMaxSeqlen = 1 << 29;

class WindowMask {
 public:
  // left, right: keys visible before and after the aligned diagonal; negative means unbounded.
  FA_HOST_DEVICE constexpr WindowMask(int seqlen_q, int seqlen_k, long long left, long long right)
      : seqlen_q_(seqlen_q),
        seqlen_k_(seqlen_k),
        left_(clamp(left, seqlen_q + seqlen_k)),
        right_(clamp(right, seqlen_q + seqlen_k)) {}

  // The same window over sequences that are at most as long.
  FA_HOST_DEVICE constexpr WindowMask over(int seqlen_q, int seqlen_k) const {
    return {seqlen_q, seqlen_k, left_, right_};
  }

  FA_HOST_DEVICE constexpr bool is_full() const {
    // The first row sees the last key, and the last row sees the first.
    return seqlen_q_ == 0 || seqlen_k_ == 0 ||
           (offset() + right_ >= seqlen_k_ - 1 && seqlen_k_ - 1 - left_ <= 0);
  }

  FA_HOST_DEVICE constexpr bool allows(int query, int key) const {
    const int relative = key - query - offset();
    return key >= 0 && key < seqlen_k_ && -left_ <= relative && relative <= right_;
  }

  // Keys that at least one query of [queries.begin, queries.end) sees.
  FA_HOST_DEVICE constexpr Range keys_seen_by_any(Range queries) const {
    const Range rows = clip(queries, seqlen_q_);
    return rows.empty()
               ? Range{0, 0}
               : clip({rows.begin + offset() - left_, rows.end + offset() + right_}, seqlen_k_);
  }

  // Keys that every query of the range sees: no mask is needed there.
  FA_HOST_DEVICE constexpr Range keys_seen_by_all(Range queries) const {
    const Range rows = clip(queries, seqlen_q_);
    return rows.empty()
               ? Range{0, 0}
               : clip({rows.end - 1 + offset() - left_, rows.begin + 1 + offset() + right_},
                      seqlen_k_);
  }

  // Queries that see at least one key of [keys.begin, keys.end).
  FA_HOST_DEVICE constexpr Range queries_seeing_any(Range keys) const {
    const Range columns = clip(keys, seqlen_k_);
    return columns.empty()
               ? Range{0, 0}
               : clip({columns.begin - offset() - right_, columns.end - offset() + left_},
                      seqlen_q_);
  }

  // Queries that see every key of the range; none where it reaches past the sequence.
  FA_HOST_DEVICE constexpr Range queries_seeing_all(Range keys) const {
    return keys.empty() || keys.end > seqlen_k_
               ? Range{0, 0}
               : clip({keys.end - 1 - offset() - right_, keys.begin + 1 - offset() + left_},
                      seqlen_q_);
  }

  // A query i sees the keys j of its sequence with lowest() <= j - i <= highest().
  FA_HOST_DEVICE constexpr int lowest() const { return offset() - left_; }
  FA_HOST_DEVICE constexpr int highest() const { return offset() + right_; }

  FA_HOST_DEVICE constexpr int seqlen_q() const { return seqlen_q_; }
  FA_HOST_DEVICE constexpr int seqlen_k() const { return seqlen_k_; }
  // How far the key that is aligned with a query lies after it.
  FA_HOST_DEVICE constexpr int offset() const { return seqlen_k_ - seqlen_q_; }

 private:
  FA_HOST_DEVICE static constexpr int clamp(long long bound, int unbounded) {
    return bound < 0 || bound > unbounded ? unbounded : static_cast<int>(bound);
  }

  // The part of a range inside [0, limit).
  FA_HOST_DEVICE static constexpr Range clip(Range range, int limit) {
    const int begin = min(max(range.begin, 0), limit);
    return {begin, max(min(range.end, limit), begin)};
  }

  int seqlen_q_;
  int seqlen_k_;
  int left_;
  int right_;
};

}  // namespace fa
