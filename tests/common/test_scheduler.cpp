// SPDX-License-Identifier: BSD-3-Clause
// TileScheduler visits every work tile once, and counts further than 32 bits reach.
#include "common/scheduler.h"

#include <cstdint>
#include <limits>
#include <vector>

#include "tests/support/check.h"

namespace {

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

void check_each_visited_once(const TileScheduler& scheduler) {
  const int64_t count = scheduler.count();
  FA_EXPECT_EQ(count, int64_t{scheduler.tiles} * scheduler.heads * scheduler.batch);
  std::vector<int> visits(static_cast<size_t>(count));
  for (int64_t index = 0; index < count; ++index) {
    const WorkTile work = scheduler.at(index);
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

}  // namespace

int main() {
  for (const int tiles : {0, 1, 2, 7}) {
    for (const int heads : {0, 1, 3, 8}) {
      for (const int batch : {0, 1, 2, 5}) {
        check_each_visited_once({tiles, heads, batch});
        check_tiles_are_innermost({tiles, heads, batch});
      }
    }
  }
  constexpr int kLargest = std::numeric_limits<int>::max();
  check_beyond_32_bits({1 << 23, 128, 8});
  check_beyond_32_bits({1 << 23, 1 << 16, 1 << 16});
  check_beyond_32_bits({kLargest, kLargest, 2});
  check_beyond_32_bits({1, kLargest, kLargest});
  check_beyond_32_bits({kLargest, 1, kLargest});
  return fa::test::report("common/test_scheduler");
}
