// SPDX-License-Identifier: BSD-3-Clause
// Which scores of a tile the window and the prefix hide.
#pragma once

#include "common/score_rules.h"
#include "cpu/tile.h"

namespace fa::cpu::FA_CPU_ISA {

// The keys that each query of a tile sees.
template <typename Real, int kTileM>
class VisibleKeys {
 public:
  void set(const PrefixWindow& window, Range queries) {
    prefix_ = window.prefix();
    for (int query = 0; query < kTileM; ++query) {
      const int index = queries.begin + query;
      const Range keys = query < queries.size()
                             ? window.window().keys_seen_by_any({index, index + 1})
                             : Range{0, 0};
      begin_[query] = keys.begin;
      end_[query] = keys.end;
    }
  }

  // tile (keys, queries) = hidden where a query does not see a key.
  void hide(Range keys, int queries, Real hidden, Tile<Real> tile) const {
    using Int = typename Simd<Real>::Int;
    for (int key = max(keys.begin, prefix_); key < keys.end; ++key) {
      Real* line = tile.row(key - keys.begin);
      for (int query = 0; query < queries; query += kLanes<Real>) {
        const Int begin = *reinterpret_cast<const Int*>(begin_ + query);
        const Int end = *reinterpret_cast<const Int*>(end_ + query);
        const Int seen = (begin <= key) & (end > key);
        store(line + query, seen ? load(line + query) : broadcast(hidden));
      }
    }
  }

 private:
  using Lane = typename Simd<Real>::Lane;
  int prefix_ = 0;  // keys that all queries see
  alignas(kCacheLine) Lane begin_[kTileM];
  alignas(kCacheLine) Lane end_[kTileM];
};

}  // namespace fa::cpu::FA_CPU_ISA
