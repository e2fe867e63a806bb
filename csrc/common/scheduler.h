// SPDX-License-Identifier: BSD-3-Clause
// Work item i -> (tile, head, batch). Tiles of one head are neighbours, so that blocks that run
// together read the same keys and values through L2.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "common/types.h"
#include "common/window.h"

namespace fa {

struct WorkTile {
  int tile;
  int head;
  int batch;
};

// The queries of a tile of a sequence of `length`, none past its last tile. Whole tiles end with
// the sequence: what they leave over is the first tile, which sees the fewest keys under a causal
// mask.
FA_HOST_DEVICE constexpr Range queries_of_tile(int tile, int length, int tile_m) {
  const int tiles_behind = ceil_div(length, tile_m) - 1 - tile;
  const int end = tiles_behind < 0 ? 0 : length - tiles_behind * tile_m;
  return {max(end - tile_m, 0), end};
}

struct TileScheduler {
  int tiles;  // per head
  int heads;
  int batch;
  int64_t first = 0;  // work item of block 0, where one launch cannot have a block for each

  FA_HOST_DEVICE constexpr int64_t count() const { return int64_t{tiles} * heads * batch; }

  FA_HOST_DEVICE constexpr WorkTile at(int64_t index) const {
    const int64_t head_index = divide(index, tiles);
    const int64_t batch_index = divide(head_index, heads);
    return {static_cast<int>(index - head_index * tiles),
            static_cast<int>(head_index - batch_index * heads), static_cast<int>(batch_index)};
  }

  // The same, with the tiles of a head from last to first: under a causal mask the last tile of
  // queries is the longest, and what starts first should be.
  FA_HOST_DEVICE constexpr WorkTile last_first(int64_t index) const {
    const WorkTile tile = at(index);
    return {tiles - 1 - tile.tile, tile.head, tile.batch};
  }

  // Tile by tile for `group` neighbouring heads at a time: blocks that run together then have much
  // the same length, and read no more than group heads have. tiles * group and count() must fit 32
  // bits.
  FA_HOST_DEVICE constexpr WorkTile first_first_of_group(uint32_t index, int group) const {
    const uint32_t group_items = static_cast<uint32_t>(tiles) * static_cast<uint32_t>(group);
    const uint32_t first_head = index / group_items * static_cast<uint32_t>(group);
    const auto members = min(static_cast<uint32_t>(group),
                             static_cast<uint32_t>(int64_t{heads} * batch) - first_head);
    const uint32_t in_group = index % group_items;
    const uint32_t head_index = first_head + in_group % members;
    return {static_cast<int>(in_group / members),
            static_cast<int>(head_index % static_cast<uint32_t>(heads)),
            static_cast<int>(head_index / static_cast<uint32_t>(heads))};
  }

  // The same with the last tile first.
  FA_HOST_DEVICE constexpr WorkTile last_first_of_group(uint32_t index, int group) const {
    const WorkTile tile = first_first_of_group(index, group);
    return {tiles - 1 - tile.tile, tile.head, tile.batch};
  }

  // All heads of tile 0, then all of tile 1, and so on.
  FA_HOST_DEVICE constexpr WorkTile heads_first(int64_t index) const {
    const int64_t all_heads = int64_t{heads} * batch;
    const int64_t tile = index / all_heads;
    const int64_t head_index = index - tile * all_heads;
    const int64_t batch_index = divide(head_index, heads);
    return {static_cast<int>(tile), static_cast<int>(head_index - batch_index * heads),
            static_cast<int>(batch_index)};
  }

 private:
  // Division of 64 bits takes a GPU some hundred instructions, of 32 bits some ten.
  FA_HOST_DEVICE static constexpr int64_t divide(int64_t a, int b) {
    return a <= UINT32_MAX ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
  }
};

// Counts the items that the blocks of one launch have taken, and the blocks that found none left.
// Zero between launches.
struct WorkCounter {
  uint32_t taken;
  uint32_t finished;
};

// A tile of queries of one head.
struct QueryTile {
  int head;
  int tile;
};

// The tiles that hold a range of queries, in each of some consecutive heads.
class QueryTiles {
 public:
  FA_HOST_DEVICE constexpr QueryTiles(Range queries, int tile_rows, int first_head, int heads)
      : begin_(queries.begin / tile_rows),
        end_(ceil_div(queries.end, tile_rows)),
        last_head_(first_head + heads),
        current_{queries.empty() ? last_head_ : first_head, begin_} {}

  FA_HOST_DEVICE constexpr bool done() const { return current_.head == last_head_; }
  // How many are left, the current one included.
  FA_HOST_DEVICE constexpr int left() const {
    return (last_head_ - current_.head) * (end_ - begin_) - (current_.tile - begin_);
  }
  // Of each head: its first tile, and how many there are.
  FA_HOST_DEVICE constexpr int first_of_head() const { return begin_; }
  FA_HOST_DEVICE constexpr int of_head() const { return end_ - begin_; }
  FA_HOST_DEVICE constexpr QueryTile current() const { return current_; }
  FA_HOST_DEVICE constexpr void advance() {
    if (++current_.tile == end_) {
      current_ = {current_.head + 1, begin_};
    }
  }

 private:
  int begin_;
  int end_;
  int last_head_;
  QueryTile current_;
};

}  // namespace fa
