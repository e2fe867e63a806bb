// SPDX-License-Identifier: BSD-3-Clause
// TileScheduler visits every work tile once in each of its orders, and counts further than 32 bits
// reach. queries_of_tile covers a sequence. QueryTiles visits the tiles of a range, head by head.
#include "common/scheduler.h"

#include <cstdint>
#include <limits>
#include <vector>

#include "tests/support/check.h"

namespace {

using fa::QueryTiles;
using fa::Range;
using fa::TileScheduler;
using fa::WorkTile;
using Wide = __int128;

bool inside(const WorkTile& work, const TileScheduler& scheduler) {
  return 0 <= work.tile && work.tile < scheduler.tiles && 0 <= work.head &&
         work.head < scheduler.heads && 0 <= work.batch && work.batch < scheduler.batch;
}

Wide position(const WorkTile& work, const TileScheduler& scheduler) {
  return (Wide{work.batch} * scheduler.heads + work.head) * scheduler.tiles + work.tile;
}

template <typename Order>
void check_each_visited_once(const TileScheduler& scheduler, const Order& order) {
  const int64_t count = scheduler.count();
  FA_EXPECT_EQ(count, int64_t{scheduler.tiles} * scheduler.heads * scheduler.batch);
  std::vector<int> visits(static_cast<size_t>(count));
  for (int64_t index = 0; index < count; ++index) {
    const WorkTile work = order(index);
    FA_EXPECT(inside(work, scheduler), "index", index);
    if (inside(work, scheduler)) {
      ++visits[static_cast<size_t>(position(work, scheduler))];
    }
  }
  for (const int visit : visits) {
    FA_EXPECT_EQ(visit, 1, "tiles", scheduler.tiles, "heads", scheduler.heads, "batch",
                 scheduler.batch);
  }
}

// Blocks that run together share keys and values: neighbours are tiles of one head.
void check_tiles_are_innermost(const TileScheduler& scheduler) {
  for (int64_t index = 0; index + 1 < scheduler.count(); ++index) {
    const WorkTile work = scheduler.at(index);
    const WorkTile next = scheduler.at(index + 1);
    const bool same_head = work.head == next.head && work.batch == next.batch;
    FA_EXPECT_EQ(same_head, work.tile + 1 < scheduler.tiles, "index", index);
  }
}

// Under a causal mask the last tiles of queries are the longest, and begin first.
void check_last_first(const TileScheduler& scheduler) {
  for (int64_t index = 0; index < scheduler.count(); ++index) {
    const WorkTile work = scheduler.at(index);
    const WorkTile reversed = scheduler.last_first(index);
    FA_EXPECT_EQ(reversed.tile, scheduler.tiles - 1 - work.tile, "index", index);
    FA_EXPECT_EQ(reversed.head, work.head, "index", index);
    FA_EXPECT_EQ(reversed.batch, work.batch, "index", index);
  }
}

// A group of heads after the other, in each the last tile of all its heads first.
void check_last_first_of_group(const TileScheduler& scheduler, int group) {
  for (uint32_t index = 0; index < scheduler.count(); ++index) {
    const WorkTile last_first = scheduler.last_first_of_group(index, group);
    const WorkTile first_first = scheduler.first_first_of_group(index, group);
    FA_EXPECT_EQ(first_first.tile, scheduler.tiles - 1 - last_first.tile, "index", index);
    FA_EXPECT_EQ(first_first.head, last_first.head, "index", index);
    FA_EXPECT_EQ(first_first.batch, last_first.batch, "index", index);
  }
  for (uint32_t index = 0; index + 1 < scheduler.count(); ++index) {
    const auto group_of = [&](const WorkTile& work) {
      return (work.batch * scheduler.heads + work.head) / group;
    };
    const WorkTile work = scheduler.last_first_of_group(index, group);
    const WorkTile next = scheduler.last_first_of_group(index + 1, group);
    if (group_of(next) == group_of(work)) {
      FA_EXPECT(next.tile == work.tile || next.tile == work.tile - 1, "index", index);
    } else {
      FA_EXPECT_EQ(group_of(next), group_of(work) + 1, "index", index);
      FA_EXPECT_EQ(work.tile, 0, "index", index);
      FA_EXPECT_EQ(next.tile, scheduler.tiles - 1, "index", index);
    }
  }
}

// All heads of a tile before the next tile, and heads of one batch entry side by side.
void check_heads_first(const TileScheduler& scheduler) {
  for (int64_t index = 0; index + 1 < scheduler.count(); ++index) {
    const WorkTile work = scheduler.heads_first(index);
    const WorkTile next = scheduler.heads_first(index + 1);
    const bool last_head = work.head + 1 == scheduler.heads;
    const bool last = last_head && work.batch + 1 == scheduler.batch;
    FA_EXPECT_EQ(next.tile, work.tile + last, "index", index);
    FA_EXPECT_EQ(next.head, last_head ? 0 : work.head + 1, "index", index);
    FA_EXPECT_EQ(next.batch, last ? 0 : work.batch + last_head, "index", index);
  }
}

// The tiles of a sequence follow each other from its first to its last query; all but the first are
// whole. Those that only a longer sequence has are empty.
void check_queries_of_tile(int length, int tile_m) {
  const int tiles = (length + tile_m - 1) / tile_m;
  int next = 0;
  for (int tile = 0; tile < tiles + 3; ++tile) {
    const Range queries = fa::queries_of_tile(tile, length, tile_m);
    FA_EXPECT_EQ(queries.empty(), tile >= tiles, "length", length, "tile", tile);
    if (!queries.empty()) {
      FA_EXPECT_EQ(queries.begin, next, "length", length, "tile", tile);
      FA_EXPECT(tile == 0 ? queries.size() <= tile_m : queries.size() == tile_m, "tile", tile);
      next = queries.end;
    }
  }
  FA_EXPECT_EQ(next, length, "tile_m", tile_m);
}

void check_query_tiles(Range queries, int tile_rows, int first_head, int heads) {
  QueryTiles tiles(queries, tile_rows, first_head, heads);
  if (!tiles.done()) {
    FA_EXPECT_EQ(tiles.first_of_head(), queries.begin / tile_rows, "tile_rows", tile_rows);
    FA_EXPECT_EQ(tiles.left(), heads * tiles.of_head(), "tile_rows", tile_rows);
  }
  std::vector<int> left;
  for (int head = first_head; head < first_head + heads; ++head) {
    for (int tile = 0; tile * tile_rows < queries.end; ++tile) {
      const bool holds_some = !queries.empty() && (tile + 1) * tile_rows > queries.begin;
      if (!holds_some) {
        continue;
      }
      FA_EXPECT(!tiles.done(), "head", head, "tile", tile);
      FA_EXPECT_EQ(tiles.current().head, head, "queries", queries.begin, queries.end);
      FA_EXPECT_EQ(tiles.current().tile, tile, "queries", queries.begin, queries.end);
      left.push_back(tiles.left());
      tiles.advance();
    }
  }
  FA_EXPECT(tiles.done(), "queries", queries.begin, queries.end, "tile_rows", tile_rows);
  left.push_back(tiles.left());
  for (size_t i = 0; i < left.size(); ++i) {
    FA_EXPECT_EQ(left[i], static_cast<int>(left.size() - 1 - i), "tile_rows", tile_rows);
  }
}

void check_beyond_32_bits(const TileScheduler& scheduler) {
  const Wide count = Wide{scheduler.tiles} * scheduler.heads * scheduler.batch;
  FA_EXPECT(count <= std::numeric_limits<int64_t>::max());
  FA_EXPECT(Wide{scheduler.count()} == count, "tiles", scheduler.tiles, "heads", scheduler.heads,
            "batch", scheduler.batch);
  for (const int64_t anchor : {int64_t{0}, int64_t{1} << 31, int64_t{1} << 32, int64_t{1} << 33,
                               scheduler.count() / 2, scheduler.count() - 1}) {
    for (int64_t index = anchor - 1; index <= anchor + 1; ++index) {
      if (index < 0 || index >= scheduler.count()) {
        continue;
      }
      const WorkTile work = scheduler.at(index);
      FA_EXPECT(inside(work, scheduler), "index", index);
      FA_EXPECT(position(work, scheduler) == index, "index", index);
    }
  }
}

// Groups count in 32 bits, all of them.
void check_groups_up_to_32_bits(const TileScheduler& scheduler) {
  FA_EXPECT(scheduler.count() <= std::numeric_limits<uint32_t>::max());
  for (const int64_t index : {int64_t{0}, (int64_t{1} << 31) - 1, int64_t{1} << 31,
                              scheduler.count() - 2, scheduler.count() - 1}) {
    const WorkTile work = scheduler.last_first_of_group(static_cast<uint32_t>(index), 1);
    FA_EXPECT(inside(work, scheduler), "index", index);
    FA_EXPECT(
        position({scheduler.tiles - 1 - work.tile, work.head, work.batch}, scheduler) == index,
        "index", index);
  }
}

}  // namespace

int main() {
  for (const int tiles : {0, 1, 2, 7}) {
    for (const int heads : {0, 1, 3, 8}) {
      for (const int batch : {0, 1, 2, 5}) {
        const TileScheduler scheduler = {tiles, heads, batch};
        check_each_visited_once(scheduler, [&](int64_t index) { return scheduler.at(index); });
        check_each_visited_once(scheduler,
                                [&](int64_t index) { return scheduler.last_first(index); });
        check_each_visited_once(scheduler,
                                [&](int64_t index) { return scheduler.heads_first(index); });
        for (const int group : {1, 2, 3, 100}) {
          check_each_visited_once(scheduler, [&](int64_t index) {
            return scheduler.last_first_of_group(static_cast<uint32_t>(index), group);
          });
          check_last_first_of_group(scheduler, group);
        }
        check_tiles_are_innermost(scheduler);
        check_last_first(scheduler);
        check_heads_first(scheduler);
      }
    }
  }
  for (int length = 0; length <= 30; ++length) {
    for (const int tile_m : {1, 3, 4, 16}) {
      check_queries_of_tile(length, tile_m);
    }
  }
  for (int begin = 0; begin <= 9; ++begin) {
    for (int end = 0; end <= 9; ++end) {
      for (const int tile_rows : {1, 3, 4, 16}) {
        check_query_tiles({begin, end}, tile_rows, 0, 1);
        check_query_tiles({begin, end}, tile_rows, 6, 3);
      }
    }
  }
  constexpr int kLargest = std::numeric_limits<int>::max();
  check_beyond_32_bits({1 << 23, 128, 8});
  check_beyond_32_bits({1 << 23, 1 << 16, 1 << 16});
  check_beyond_32_bits({kLargest, kLargest, 2});
  check_beyond_32_bits({1, kLargest, kLargest});
  check_beyond_32_bits({kLargest, 1, kLargest});
  check_groups_up_to_32_bits({(1 << 23) - 1, 128, 4});
  check_groups_up_to_32_bits({1, kLargest, 2});
  check_groups_up_to_32_bits({kLargest, 1, 2});
  return fa::test::report("common/test_scheduler");
}
