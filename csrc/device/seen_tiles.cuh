// SPDX-License-Identifier: BSD-3-Clause
// Walks over tiles that leave out those in which no pair is seen. All lanes of a warp look ahead
// together, and must call these functions together.
#pragma once

#include "common/scheduler.h"
#include "common/tile_map.h"
#include "ptx/common.cuh"

namespace fa::device {

// The first of [begin, end) that `predicate` holds for, or end.
template <typename Predicate>
FA_DEVICE int find_first(int begin, int end, Predicate&& predicate) {
  for (int first = begin; first < end; first += ptx::kWarpSize) {
    const int index = first + ptx::lane_index();
    const uint32_t found = __ballot_sync(~0u, index < end && predicate(index));
    if (found != 0) {
      return first + __ffs(static_cast<int>(found)) - 1;
    }
  }
  return end;
}

// How many of [begin, end) `predicate` holds for.
template <typename Predicate>
FA_DEVICE int count_if(int begin, int end, Predicate&& predicate) {
  int count = 0;
  for (int first = begin; first < end; first += ptx::kWarpSize) {
    const int index = first + ptx::lane_index();
    count += __popc(__ballot_sync(~0u, index < end && predicate(index)));
  }
  return count;
}

// The class of each pair of tiles of one sequence, by the map where there is one.
template <int kTileM, int kTileN>
class TileClasses {
 public:
  // first_tile: the number of the sequence's first tile of queries through the batch.
  FA_DEVICE TileClasses(const TileMap& map, const PrefixWindow& window, int64_t first_tile)
      : map_(map), window_(window), first_tile_(first_tile) {}

  FA_DEVICE TileClass at(int head, int query_tile, int key_tile) const {
    return map_.classes != nullptr
               ? map_.at(head, first_tile_ + query_tile, key_tile)
               : class_of(window_, {query_tile * kTileM, (query_tile + 1) * kTileM},
                          {key_tile * kTileN, (key_tile + 1) * kTileN});
  }
  FA_DEVICE const PrefixWindow& window() const { return window_; }
  FA_DEVICE bool any_seen(int head, int query_tile, int key_tile) const {
    return at(head, query_tile, key_tile) != TileClass::kHidden;
  }

 private:
  const TileMap& map_;
  PrefixWindow window_;
  int64_t first_tile_;
};

// QueryTiles of which is_seen(head, tile).
class SeenQueryTiles {
 public:
  template <typename IsSeen>
  FA_DEVICE SeenQueryTiles(Range queries, int tile_rows, int first_head, int heads,
                           IsSeen&& is_seen)
      : begin_(queries.begin / tile_rows),
        end_(queries.empty() ? begin_ : ceil_div(queries.end, tile_rows)),
        last_head_(first_head + heads),
        current_{first_head, begin_} {
    find(is_seen);
  }

  FA_DEVICE bool done() const { return current_.head == last_head_; }
  FA_DEVICE QueryTile current() const { return current_; }

  template <typename IsSeen>
  FA_DEVICE void advance(IsSeen&& is_seen) {
    ++current_.tile;
    find(is_seen);
  }

 private:
  template <typename IsSeen>
  FA_DEVICE void find(IsSeen&& is_seen) {
    for (; !done(); current_ = {current_.head + 1, begin_}) {
      current_.tile =
          find_first(current_.tile, end_, [&](int tile) { return is_seen(current_.head, tile); });
      if (current_.tile < end_) {
        return;
      }
    }
  }

  int begin_;
  int end_;
  int last_head_;
  QueryTile current_;
};

}  // namespace fa::device
