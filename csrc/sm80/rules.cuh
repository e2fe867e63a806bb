// SPDX-License-Identifier: BSD-3-Clause
// Which pairs of tiles a block computes, and what becomes of their scores: by the window alone in
// rows whose scores are plain, by all rules in general ones. Both have the same functions, so that
// kernels are written once.
#pragma once

#include "common/params.h"
#include "common/scheduler.h"
#include "device/dropout.cuh"
#include "device/mask.cuh"
#include "device/score_rules.cuh"
#include "device/seen_tiles.cuh"
#include "device/work_order.cuh"

namespace fa::sm80 {

// Of one sequence.
template <int kTileM, int kTileN>
class PlainRules {
 public:
  template <typename Params>
  FA_DEVICE PlainRules(const Params&, const WindowMask& window, int) : window_(window) {}

  // By what finished scores are multiplied.
  static FA_DEVICE float scale(float softmax_scale) { return softmax_scale; }

  FA_DEVICE Range keys_seen_by_any(Range queries) const {
    return window_.keys_seen_by_any(queries);
  }
  FA_DEVICE Range queries_seeing_any(Range keys) const { return window_.queries_seeing_any(keys); }

  // The first key of the first tile from `key` on that is to be computed, if before `end`.
  FA_DEVICE int next_key(int, int, int key, int) const { return key; }

  FA_DEVICE QueryTiles query_tiles(Range queries, int, int first_head, int heads) const {
    return {queries, kTileM, first_head, heads};
  }
  FA_DEVICE void advance(QueryTiles& tiles, int) const { tiles.advance(); }

  // When it is a tile of keys' turn to add to a tile of queries: after those before it.
  FA_DEVICE device::InTurn in_turn(const BwdWorkspace& workspace, int64_t index, const QueryTile&,
                                   Range queries, int key_tile) const {
    return {workspace, index,
            [&] { return key_tile - window_.keys_seen_by_any(queries).begin / kTileN; }};
  }

  // Scores are then finished but for a factor of scale(softmax_scale); the first is of
  // (first_query, first_key).
  template <typename Scores>
  FA_DEVICE void finish_scores(Scores&, int, int, int) const {}

  // Forward: probabilities are dropped, and the normalizer scales those that are kept.
  template <typename Scores>
  FA_DEVICE void drop(Scores&, int, int, int) const {}
  template <typename Softmax, typename RowValues>
  FA_DEVICE void finalize(const Softmax& softmax, int, const RowValues& sums, RowValues& lse,
                          RowValues& normalizer) const {
    softmax.finalize(sums, lse, normalizer);
  }
  // Backward: dv of dropped probabilities is scaled in the end.
  template <typename KeyGradient>
  FA_DEVICE void scale_dv(KeyGradient&) const {}

  // Whether some pairs of a tile may be hidden. sees_all: whether by the window none is.
  FA_DEVICE bool is_masked(const QueryTile&, int, bool sees_all) const { return !sees_all; }

  // Where some may be: what is to be found once of a tile, the first pair of which is (first_query,
  // first_key), and then the scores of hidden pairs become `hidden`.
  template <typename Scores>
  struct Seen {};
  template <typename Scores>
  FA_DEVICE void find_seen(Seen<Scores>&, int, int, int) const {}

  template <typename Scores>
  FA_DEVICE void keep_seen(Scores& r_scores, const Seen<Scores>&, int first_query, int first_key,
                           float hidden) const {
    device::keep_visible(r_scores, window_, first_query, first_key, hidden);
  }

 private:
  WindowMask window_;
};

// Finished scores have scale and bias, and all terms, so that a scale need not be positive.
template <int kTileM, int kTileN>
class GeneralRules {
 public:
  template <typename Params>
  FA_DEVICE GeneralRules(const Params& params, const WindowMask& window, int batch)
      : rules_(params.rules),
        softmax_scale_(static_cast<float>(params.softmax_scale)),
        classes_(params.tile_map, PrefixWindow(params.rules, window, batch),
                 params.queries.first_tile(batch, params.shape.seqlen_q, kTileM)),
        batch_(batch),
        num_heads_(params.shape.num_heads) {}

  static FA_DEVICE float scale(float) { return 1.0f; }

  FA_DEVICE Range keys_seen_by_any(Range queries) const {
    return classes_.window().keys_seen_by_any(queries);
  }
  FA_DEVICE Range queries_seeing_any(Range keys) const {
    return classes_.window().queries_seeing_any(keys);
  }

  FA_DEVICE int next_key(int head, int query_tile, int key, int end) const {
    return kTileN * device::find_first(key / kTileN, ceil_div(end, kTileN), [&](int key_tile) {
             return classes_.any_seen(head, query_tile, key_tile);
           });
  }

  FA_DEVICE device::SeenQueryTiles query_tiles(Range queries, int key_tile, int first_head,
                                               int heads) const {
    return {queries, kTileM, first_head, heads, seen_with(key_tile)};
  }
  FA_DEVICE void advance(device::SeenQueryTiles& tiles, int key_tile) const {
    tiles.advance(seen_with(key_tile));
  }

  // Of those before it, the ones with a hidden pair of tiles add nothing.
  FA_DEVICE device::InTurn in_turn(const BwdWorkspace& workspace, int64_t index,
                                   const QueryTile& at, Range queries, int key_tile) const {
    int before = 0;
    if (workspace.turns != nullptr) {
      before =
          device::count_if(classes_.window().keys_seen_by_any(queries).begin / kTileN, key_tile,
                           [&](int other) { return classes_.any_seen(at.head, at.tile, other); });
    }
    return {workspace, index, [&] { return before; }};
  }

  template <typename Scores>
  FA_DEVICE void finish_scores(Scores& r_scores, int head, int first_query, int first_key) const {
    of_head(head).finish_scores(r_scores, softmax_scale_, first_query, first_key);
  }
  // visit_tanh: as for HeadRules::finish_scores().
  template <typename Scores, typename Visit>
  FA_DEVICE void finish_scores(Scores& r_scores, int head, int first_query, int first_key,
                               Visit&& visit_tanh) const {
    of_head(head).finish_scores(r_scores, softmax_scale_, first_query, first_key, visit_tanh);
  }

  // In backward, what dropout keeps is found for the gradients of dropped probabilities, which
  // become those of all, and then dropped from these.
  template <typename Scores>
  FA_DEVICE void drop_gradients(Scores& r_dp, device::Kept<Scores>& kept, int head, int first_query,
                                int first_key) const {
    if (dropout().any()) {
      kept.find(dropout_of(head), first_query, first_key);
      r_dp.scale(static_cast<float>(dropout().scale));
      kept.drop(r_dp);
    }
  }
  template <typename Scores>
  FA_DEVICE void drop_again(Scores& r_p, const device::Kept<Scores>& kept) const {
    if (dropout().any()) {
      kept.drop(r_p);
    }
  }
  template <typename KeyGradient>
  FA_DEVICE void scale_dv(KeyGradient& r_dv) const {
    if (dropout().any()) {
      r_dv.scale(static_cast<float>(dropout().scale));
    }
  }

  template <typename Scores>
  FA_DEVICE void drop(Scores& r_p, int head, int first_query, int first_key) const {
    if (dropout().any()) {
      device::drop(r_p, dropout_of(head), first_query, first_key);
    }
  }
  template <typename Softmax, typename RowValues>
  FA_DEVICE void finalize(const Softmax& softmax, int head, const RowValues& sums, RowValues& lse,
                          RowValues& normalizer) const {
    const HeadValues& sinks = rules_.terms.sinks;
    const float sink = sinks.data == nullptr ? -INFINITY : sinks.at<const float>(0, head);
    softmax.finalize(sums, lse, normalizer, &sink);
    if (dropout().any()) {
      for (float& factor : normalizer) {
        factor *= static_cast<float>(dropout().scale);
      }
    }
  }

  FA_DEVICE bool is_masked(const QueryTile& at, int key_tile, bool) const {
    return classes_.at(at.head, at.tile, key_tile) != TileClass::kSeen;
  }

  template <typename Scores>
  struct Seen {
    device::SeenColumns<Scores> columns;
  };
  template <typename Scores>
  FA_DEVICE void find_seen(Seen<Scores>& seen, int head, int first_query, int first_key) const {
    of_head(head).template find_seen<Scores>(seen.columns, first_query, first_key);
  }
  template <typename Scores>
  FA_DEVICE void keep_seen(Scores& r_scores, const Seen<Scores>& seen, int, int,
                           float hidden) const {
    device::keep_seen(r_scores, seen.columns, hidden);
  }

 private:
  FA_DEVICE device::HeadRules of_head(int head) const {
    return {rules_, classes_.window(), batch_, head};
  }
  FA_DEVICE const Dropout& dropout() const { return rules_.terms.dropout; }
  FA_DEVICE DropoutOfHead dropout_of(int head) const {
    return {dropout(), batch_, head, num_heads_};
  }
  FA_DEVICE auto seen_with(int key_tile) const {
    return [this, key_tile](int head, int query_tile) {
      return classes_.any_seen(head, query_tile, key_tile);
    };
  }

  const ScoreRules& rules_;
  float softmax_scale_;
  device::TileClasses<kTileM, kTileN> classes_;
  int batch_;
  int num_heads_;
};

}  // namespace fa::sm80
