// SPDX-License-Identifier: BSD-3-Clause
// What the blocks of the general backward kernel work on, and which tiles of queries that is.
#pragma once

#include "common/key_tiles.h"
#include "device/seen_tiles.cuh"
#include "sm90/bwd_work.cuh"

namespace fa::sm90 {

// In shared memory, with what those who walk its tiles would have to compute again and again.
template <int kTileM, int kTileN>
struct GeneralBwdWork : BwdWork {
  int prefix;
  Range heads;        // of queries
  Range query_tiles;  // in which the window or the prefix let some query see a key
  // Whether there is a tile that nothing hides. By the warp that loads queries, when it has looked.
  bool has_visible_tiles;

  // By one warp.
  FA_DEVICE void write(const BwdParams& params, const BwdWork& work) {
    if (ptx::lane_index() != 0) {
      return;
    }
    static_cast<BwdWork&>(*this) = work;
    if (!work.is_end()) {
      const PrefixWindow of_batch(params.rules, work.window, work.tile.batch);
      const Range any =  // as of_batch.queries_seeing_any() has it
          work.first_key < of_batch.prefix() ? Range{0, work.queries.length} : work.seeing;
      prefix = of_batch.prefix();
      heads.begin = work.tile.head * params.shape.group_size();
      heads.end = heads.begin + params.shape.group_size();
      query_tiles.begin = any.begin / kTileM;
      query_tiles.end = any.empty() ? query_tiles.begin : ceil_div(any.end, kTileM);
    }
  }

  FA_DEVICE PrefixWindow prefix_window() const { return {window, prefix}; }
  FA_DEVICE int key_tile() const { return first_key / kTileN; }

  FA_DEVICE TileClass class_at(const TileMap& map, const QueryTile& at) const {
    return device::TileClasses<kTileM, kTileN>(map, prefix_window(), first_query_tile)
        .at(at.head, at.tile, key_tile());
  }

  // By one warp: how many tiles of keys behind this one add to a tile of queries before it does,
  // those in which one of the queries sees a key.
  FA_DEVICE int turn(const TileMap& map, const QueryTile& at) const {
    if (map.classes == nullptr) {
      return turn_of_key_tile(prefix_window(), at.tile, kTileM, key_tile(), kTileN);
    }
    const TileClass* g_row = map.row(at.head, first_query_tile + at.tile);
    return device::count_if(key_tile() + 1, ceil_div(keys.length, kTileN),
                            [&](int other) { return g_row[other] != TileClass::kHidden; });
  }
};

// By one warp: the tiles of queries of all heads that share a tile of keys, without those in which
// no query sees a key. Looks at as many tiles of a head at a time as the warp has lanes, and has
// the map's bytes of the next ones on their way meanwhile.
template <int kTileM, int kTileN>
class VisibleQueryTiles {
 public:
  using Work = GeneralBwdWork<kTileM, kTileN>;

  // s_work: for as long as this is in use.
  FA_DEVICE VisibleQueryTiles(const BwdParams& params, const Work& s_work)
      : map_(params.tile_map),
        s_work_(s_work),
        next_{s_work.query_tiles.empty() ? s_work.heads.end : s_work.heads.begin,
              s_work.query_tiles.begin},
        ahead_(class_ahead()) {
    look();
  }

  FA_DEVICE bool done() const { return visible_ == 0; }
  FA_DEVICE QueryTile current() const {
    const Range& tiles = s_work_.query_tiles;
    return next_.tile == tiles.begin  // those looked at are the last ones of the head before
               ? QueryTile{next_.head - 1, tiles.begin + last_of_head() + bit()}
               : QueryTile{next_.head, next_.tile - ptx::kWarpSize + bit()};
  }
  // Whether some of its pairs may be hidden, or do not exist.
  FA_DEVICE bool is_mixed() const { return mixed_ >> bit() & 1; }
  // Whether at most so many are left, the current one included. It may say no where there are, but
  // not when done.
  FA_DEVICE bool has_at_most(int tiles) const {
    return next_.head == s_work_.heads.end && __popc(visible_) <= tiles;
  }
  FA_DEVICE void advance() {
    visible_ &= visible_ - 1;
    look();
  }

 private:
  // Of the tiles of a head, the first of those that are looked at last.
  FA_DEVICE int last_of_head() const {
    return (s_work_.query_tiles.size() - 1) / ptx::kWarpSize * ptx::kWarpSize;
  }
  FA_DEVICE int bit() const { return __ffs(static_cast<int>(visible_)) - 1; }

  // Of this lane's tile of the next ones.
  FA_DEVICE TileClass class_ahead() const {
    const QueryTile at = {next_.head, next_.tile + ptx::lane_index()};
    return at.head < s_work_.heads.end && at.tile < s_work_.query_tiles.end
               ? s_work_.class_at(map_, at)
               : TileClass::kHidden;
  }

  FA_DEVICE void look() {
    while (visible_ == 0 && next_.head < s_work_.heads.end) {
      const int end_query = (next_.tile + ptx::lane_index() + 1) * kTileM;
      next_.tile += ptx::kWarpSize;
      if (next_.tile >= s_work_.query_tiles.end) {
        next_ = {next_.head + 1, s_work_.query_tiles.begin};
      }
      const TileClass tile_class = ahead_;
      ahead_ = class_ahead();
      visible_ = __ballot_sync(~0u, tile_class != TileClass::kHidden);
      mixed_ =
          __ballot_sync(~0u, tile_class != TileClass::kSeen || end_query > s_work_.queries.length);
    }
  }

  const TileMap& map_;
  const Work& s_work_;
  QueryTile next_;        // the first one not looked at
  TileClass ahead_;       // of this lane's next one
  uint32_t visible_ = 0;  // of those looked at, as bits
  uint32_t mixed_ = 0;
};

}  // namespace fa::sm90
