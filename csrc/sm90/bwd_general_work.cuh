// SPDX-License-Identifier: BSD-3-Clause
// What the blocks of the general backward kernel work on, and which tiles of queries that is.
#pragma once

#include "common/score_rules.h"
#include "device/seen_tiles.cuh"
#include "sm90/bwd_work.cuh"

namespace fa::sm90 {

// In shared memory: `seeing` counts queries that see a key through the prefix alone, too.
template <int kTileN>
struct GeneralBwdWork : BwdWork {
  int prefix;

  // By one warp.
  FA_DEVICE void write(const BwdParams& params, const BwdWork& work) {
    if (ptx::lane_index() != 0) {
      return;
    }
    static_cast<BwdWork&>(*this) = work;
    if (!work.is_end()) {
      const PrefixWindow of_batch(params.rules, work.window, work.tile.batch);
      prefix = of_batch.prefix();
      seeing = of_batch.queries_seeing_any({work.first_key, work.first_key + kTileN});
    }
  }

  FA_DEVICE PrefixWindow prefix_window() const { return {window, prefix}; }
};

// By one warp: the tiles of queries of all heads that share a tile of keys, without those in which
// no query sees a key. Looks at as many tiles of a head at a time as the warp has lanes, and has
// the map's bytes of the next ones on their way meanwhile.
template <int kTileM, int kTileN>
class VisibleQueryTiles {
 public:
  // s_work: as long as this is in use.
  FA_DEVICE VisibleQueryTiles(const BwdParams& params, const GeneralBwdWork<kTileN>& s_work)
      : params_(params), s_work_(s_work) {
    next_ = {first_head(), begin()};
    if (s_work.seeing.empty()) {
      next_.head = end_head();
    }
    ahead_ = class_ahead();
    look();
  }

  FA_DEVICE bool done() const { return visible_ == 0; }
  FA_DEVICE QueryTile current() const { return {first_.head, first_.tile + bit()}; }
  // Whether some of its pairs may be hidden, or do not exist.
  FA_DEVICE bool is_mixed() const { return mixed_ >> bit() & 1; }
  // Whether at most so many are left, the current one included. It may say no where there are, but
  // not when done.
  FA_DEVICE bool has_at_most(int tiles) const {
    return next_.head == end_head() && __popc(visible_) <= tiles;
  }
  FA_DEVICE void advance() {
    visible_ &= visible_ - 1;
    look();
  }

  // How many tiles of keys behind this one add to the current tile before it does: those in which
  // one of its queries sees a key.
  FA_DEVICE int turn() const {
    const QueryTile tile = current();
    const Range queries = {tile.tile * kTileM, (tile.tile + 1) * kTileM};
    const auto classes = tile_classes();
    const int end = ceil_div(classes.window().keys_seen_by_any(queries).end, kTileN);
    return device::count_if(key_tile() + 1, end, [&](int other) {
      return classes.any_seen(tile.head, tile.tile, other);
    });
  }

 private:
  FA_DEVICE int bit() const { return __ffs(static_cast<int>(visible_)) - 1; }
  FA_DEVICE int first_head() const { return s_work_.tile.head * params_.shape.group_size(); }
  FA_DEVICE int end_head() const { return first_head() + params_.shape.group_size(); }
  FA_DEVICE int begin() const { return s_work_.seeing.begin / kTileM; }
  FA_DEVICE int end() const { return ceil_div(s_work_.seeing.end, kTileM); }
  FA_DEVICE int key_tile() const { return s_work_.first_key / kTileN; }
  FA_DEVICE device::TileClasses<kTileM, kTileN> tile_classes() const {
    return {params_.tile_map, s_work_.prefix_window(), s_work_.first_query_tile};
  }

  // Of this lane's tile of the next ones.
  FA_DEVICE TileClass class_ahead() const {
    const int tile = next_.tile + ptx::lane_index();
    return next_.head < end_head() && tile < end() ? tile_classes().at(next_.head, tile, key_tile())
                                                   : TileClass::kHidden;
  }

  FA_DEVICE void look() {
    while (visible_ == 0 && next_.head < end_head()) {
      first_ = next_;
      next_.tile += ptx::kWarpSize;
      if (next_.tile >= end()) {
        next_ = {first_.head + 1, begin()};
      }
      const TileClass tile_class = ahead_;
      ahead_ = class_ahead();
      const int end_query = (first_.tile + ptx::lane_index() + 1) * kTileM;
      visible_ = __ballot_sync(~0u, tile_class != TileClass::kHidden);
      mixed_ =
          __ballot_sync(~0u, tile_class != TileClass::kSeen || end_query > s_work_.queries.length);
    }
  }

  const BwdParams& params_;
  const GeneralBwdWork<kTileN>& s_work_;
  QueryTile next_;   // the first one not looked at
  TileClass ahead_;  // of this lane's next one
  QueryTile first_;  // of those looked at, as bits:
  uint32_t visible_ = 0;
  uint32_t mixed_ = 0;
};

}  // namespace fa::sm90
