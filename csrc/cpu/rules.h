// SPDX-License-Identifier: BSD-3-Clause
// What the rules of common/score_rules.h make of a tile of scores: nothing to compute where no
// query sees a key, nothing to add where every query sees every key and there is neither bias nor
// ALiBi, and else a tile of addends: these, and -inf where a pair is hidden.
#pragma once

#include <cstdint>

#include "common/score_rules.h"
#include "common/tile_map.h"
#include "cpu/convert.h"
#include "cpu/mask.h"
#include "cpu/terms.h"
#include "cpu/tile.h"

namespace fa::cpu::FA_CPU_ISA {

// Calls visit.template operator()<kDtype>() for a dtype.
template <typename Visitor>
FA_CPU_INLINE void with_dtype(Dtype dtype, const Visitor& visit) {
  switch (dtype) {
    case Dtype::kFloat64:
      return visit.template operator()<Dtype::kFloat64>();
    case Dtype::kFloat32:
      return visit.template operator()<Dtype::kFloat32>();
    case Dtype::kFloat16:
      return visit.template operator()<Dtype::kFloat16>();
    case Dtype::kBFloat16:
      return visit.template operator()<Dtype::kBFloat16>();
    case Dtype::kTf32:  // of no tensor
      break;
  }
}

// values[i] = source[i * stride]. Their count is rounded up to whole vectors, with zeros.
template <Dtype kDtype, typename Real>
void gather(const void* source, int64_t stride, int count, Real* values) {
  using Element = typename ElementOf<kDtype>::Element;
  using Wide = typename ElementOf<kDtype>::Real;
  for (int first = 0; first < count; first += kLanes<Wide>) {
    const Element* elements = static_cast<const Element*>(source) + first * stride;
    Element lanes[kLanes<Wide>] = {};
    for (int lane = 0; lane < min(kLanes<Wide>, count - first); ++lane) {
      lanes[lane] = elements[lane * stride];
    }
    Wide wide[kLanes<Wide>];
    store(wide, load_elements(lanes));
    for (int lane = 0; lane < kLanes<Wide>; ++lane) {
      values[first + lane] = static_cast<Real>(wide[lane]);
    }
  }
}

// target[i * stride] = values[i]. Values are read to whole vectors.
template <Dtype kDtype, typename Real>
void scatter(const Real* values, int count, void* target, int64_t stride) {
  using Element = typename ElementOf<kDtype>::Element;
  using Wide = typename ElementOf<kDtype>::Real;
  for (int first = 0; first < count; first += kLanes<Wide>) {
    Wide wide[kLanes<Wide>];
    for (int lane = 0; lane < kLanes<Wide>; ++lane) {
      wide[lane] = static_cast<Wide>(values[first + lane]);
    }
    Element lanes[kLanes<Wide>];
    store_elements(lanes, load(wide));
    Element* elements = static_cast<Element*>(target) + first * stride;
    for (int lane = 0; lane < min(kLanes<Wide>, count - first); ++lane) {
      elements[lane * stride] = lanes[lane];
    }
  }
}

// Where a walk over tiles begins: with masks at a whole tile, so that none lies in two blocks.
FA_CPU_INLINE int first_of_walk(const ScoreRules& rules, Range seen, int tile_size) {
  return rules.has_data_masks() ? seen.begin / tile_size * tile_size : seen.begin;
}

// What a mask says of the pairs of a tile.
FA_CPU_INLINE TileClass class_by_mask(const KeepMask& mask, const uint8_t* bytes, Range queries,
                                      Range keys) {
  const auto blocks = [&mask](Range range, int64_t stride) {
    return stride == 0
               ? Range{0, 1}
               : Range{range.begin >> mask.block_log2, ((range.end - 1) >> mask.block_log2) + 1};
  };
  const Range columns = blocks(keys, mask.key_stride);
  const Range rows = blocks(queries, mask.query_stride);
  bool any = false;
  bool all = true;
  for (int row = rows.begin; row < rows.end; ++row) {
    for (int column = columns.begin; column < columns.end; ++column) {
      const bool kept = bytes[mask.offset(row, column)] != 0;
      any |= kept;
      all &= kept;
    }
    if (any && !all) {
      return TileClass::kMixed;
    }
  }
  return any ? TileClass::kSeen : TileClass::kHidden;
}

// What documents say, as far as the lowest and highest number of a range tell.
FA_CPU_INLINE TileClass class_by_documents(const int32_t* ids, Range queries, Range keys) {
  const auto span = [ids](Range range) {
    Range ends = {ids[range.begin], ids[range.begin]};  // the end is a document's number too
    for (int index = range.begin + 1; index < range.end; ++index) {
      ends = {min(ends.begin, ids[index]), max(ends.end, ids[index])};
    }
    return ends;
  };
  const Range of_queries = span(queries);
  const Range of_keys = span(keys);
  if (of_queries.end < of_keys.begin || of_keys.end < of_queries.begin) {
    return TileClass::kHidden;
  }
  const bool one = min(of_queries.begin, of_keys.begin) == max(of_queries.end, of_keys.end);
  return one ? TileClass::kSeen : TileClass::kMixed;
}

template <typename Real, int kTileM, int kTileN>
class TileRules {
 public:
  explicit TileRules(const ScoreRules& rules)
      : rules_(rules), addends_(rules.any() ? kTileN : 0, kTileM) {}

  void set_queries(const PrefixWindow& window, const Rows& queries) {
    window_ = &window;
    queries_ = queries;
    in_window_.set(window, queries.range);
    if (has_alibi()) {
      distances_.set(window.window(), queries.range);
    }
  }

  // Whether some query may see some of the keys. To be asked of each tile before what follows.
  bool any_seen(Range keys) {
    keys_ = keys;
    by_window_ = class_of(*window_, queries_.range, keys);
    by_data_ = by_window_ == TileClass::kHidden ? TileClass::kHidden : class_by_data();
    return by_data_ != TileClass::kHidden;
  }

  // scores (keys, queries) get their bias and ALiBi, and become -inf where hidden.
  void apply(int columns, Tile<Real> scores) {
    if (!has_addends()) {
      hide_by_window(columns, -kInfinity<Real>, scores);
      return;
    }
    compute_addends(columns);
    for (int key = 0; key < keys_.size(); ++key) {
      for (int query = 0; query < columns; query += kLanes<Real>) {
        Real* score = scores.row(key) + query;
        const Vec<Real> addend = load(addends_.tile().row(key) + query);
        const Vec<Real> hidden = broadcast(-kInfinity<Real>);
        store(score, addend == hidden ? hidden : load(score) + addend);
      }
    }
  }

  // The gradient of the tile's slope: the sum of ds (keys, queries), 0 past the queries, times what
  // the slope is multiplied by.
  Real sum_for_slope(int columns, Tile<Real> ds) const {
    Vec<Real> sum = {};
    for (int key = 0; key < keys_.size(); ++key) {
      for (int query = 0; query < columns; query += kLanes<Real>) {
        sum += load(ds.row(key) + query) * distances_.at(keys_.begin + key, query);
      }
    }
    return sum_of_lanes<Real>(sum);
  }

  // After apply(): tile (keys, queries) = 0 where a pair is hidden.
  void clear_hidden(int columns, Tile<Real> tile) const {
    if (!has_addends()) {
      hide_by_window(columns, 0, tile);
      return;
    }
    for (int key = 0; key < keys_.size(); ++key) {
      for (int query = 0; query < columns; query += kLanes<Real>) {
        Real* value = tile.row(key) + query;
        const Vec<Real> addend = load(addends_.tile().row(key) + query);
        store(value, addend == broadcast(-kInfinity<Real>) ? Vec<Real>{} : load(value));
      }
    }
  }

 private:
  bool has_alibi() const { return rules_.terms.alibi.data != nullptr; }
  bool has_addends() const {
    return rules_.bias.data != nullptr || has_alibi() || by_data_ != TileClass::kSeen;
  }

  void hide_by_window(int columns, Real hidden, Tile<Real> tile) const {
    if (by_window_ != TileClass::kSeen) {
      in_window_.hide(keys_, columns, hidden, tile);
    }
  }

  const uint8_t* bytes_of(const KeepMask& mask) const {
    return mask.of_head<const uint8_t>(queries_.batch, queries_.head);
  }
  const int32_t* documents() const {
    return rules_.document_ids + queries_.batch * rules_.document_stride;
  }

  // The strictest of what masks and documents say; they may hide all pairs in turn, and it be
  // mixed.
  TileClass class_by_data() const {
    TileClass strictest = TileClass::kSeen;
    if (rules_.document_ids != nullptr) {
      strictest = class_by_documents(documents(), queries_.range, keys_);
    }
    for (const KeepMask& mask : rules_.masks) {
      if (mask.data != nullptr && strictest != TileClass::kHidden) {
        strictest = min(strictest, class_by_mask(mask, bytes_of(mask), queries_.range, keys_));
      }
    }
    return strictest;
  }

  void compute_addends(int columns) {
    const Tile<Real> addends = addends_.tile();  // (keys, queries)
    fill_rows<Real>(addends, keys_.size(), columns, 0);
    if (rules_.bias.data != nullptr) {
      with_dtype(rules_.bias_dtype, [this]<Dtype kDtype>() { load_bias<kDtype>(); });
    }
    if (has_alibi()) {
      add_alibi(columns, addends);
    }
    if (by_data_ != TileClass::kSeen) {
      hide_by_data();
    }
    hide_by_window(columns, -kInfinity<Real>, addends);
  }

  void add_alibi(int columns, Tile<Real> addends) const {
    const Real slope = rules_.terms.alibi.at<const Real>(queries_.batch, queries_.head);
    for (int key = 0; key < keys_.size(); ++key) {
      for (int query = 0; query < columns; query += kLanes<Real>) {
        Real* addend = addends.row(key) + query;
        store(addend, load(addend) + slope * distances_.at(keys_.begin + key, query));
      }
    }
  }

  template <Dtype kDtype>
  void load_bias() {
    using Element = typename ElementOf<kDtype>::Element;
    const ScoreTensor& bias = rules_.bias;
    const auto* elements = bias.of_head<const Element>(queries_.batch, queries_.head);
    Real line[kTileN];
    for (int query = 0; query < queries_.range.size(); ++query) {
      gather<kDtype>(elements + bias.offset(queries_.range.begin + query, keys_.begin),
                     bias.key_stride, keys_.size(), line);
      for (int key = 0; key < keys_.size(); ++key) {
        addends_.tile().row(key)[query] = line[key];
      }
    }
  }

  void hide_by_data() {
    if (rules_.document_ids != nullptr) {
      hide_unless([ids = documents()](int query, int key) { return ids[query] == ids[key]; });
    }
    for (const KeepMask& mask : rules_.masks) {
      if (mask.data != nullptr) {
        hide_unless([&mask, bytes = bytes_of(mask)](int query, int key) {
          return bytes[mask.offset(query >> mask.block_log2, key >> mask.block_log2)] != 0;
        });
      }
    }
  }

  template <typename Keeps>
  FA_CPU_INLINE void hide_unless(const Keeps& keeps) {
    for (int query = 0; query < queries_.range.size(); ++query) {
      for (int key = 0; key < keys_.size(); ++key) {
        Real& addend = addends_.tile().row(key)[query];
        const bool kept = keeps(queries_.range.begin + query, keys_.begin + key);
        addend = kept ? addend : -kInfinity<Real>;
      }
    }
  }

  const ScoreRules& rules_;
  const PrefixWindow* window_ = nullptr;
  Rows queries_{};
  Range keys_{};
  TileClass by_window_ = TileClass::kSeen;
  TileClass by_data_ = TileClass::kSeen;
  VisibleKeys<Real, kTileM> in_window_;
  AlibiDistances<Real, kTileM> distances_;
  TileBuffer<Real> addends_;
};

}  // namespace fa::cpu::FA_CPU_ISA
