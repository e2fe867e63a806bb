// SPDX-License-Identifier: BSD-3-Clause
// Strips hold every tile of the gradient of a bias once, and are long only where nothing shares a
// tile and all blocks have several.
#include "common/dbias_tiles.h"

#include <cstdint>
#include <vector>

#include "tests/support/check.h"

namespace {

using fa::DbiasTiles;
using fa::Range;
using fa::ScoreTensor;
using fa::Shape;
using fa::TileScheduler;

constexpr int kTile = 128;
constexpr int kBlocks = 132;

struct Bias {
  bool of_batch;
  bool of_heads;
  bool of_queries;
  bool of_keys;

  // Of strides nothing matters here but whether they are 0.
  ScoreTensor gradient() const { return {nullptr, of_batch, of_heads, of_queries, of_keys}; }
};
constexpr Bias kWhole = {true, true, true, true};

Shape shape_of(int batch, int heads, int seqlen_q, int seqlen_k) {
  return {batch, heads, 1, seqlen_q, seqlen_k, 64, 64};
}

DbiasTiles tiles_of(const Shape& shape, const Bias& bias) {
  return DbiasTiles::of(shape, bias.gradient(), kTile, kTile, kBlocks);
}

void check_ranges() {
  FA_EXPECT_EQ(fa::entries_of(7, 0), 1);
  FA_EXPECT_EQ(fa::entries_of(7, 3), 7);
  const auto check = [](int entry, int count, int64_t stride, Range expected) {
    const Range range = fa::shared_range(entry, count, stride);
    FA_EXPECT(range.begin == expected.begin && range.end == expected.end, "entry", entry, "of",
              count, "stride", stride);
  };
  check(0, 5, 0, {0, 5});
  check(0, 0, 0, {0, 0});
  check(2, 5, 1, {2, 3});
  check(5, 5, 1, {5, 5});  // past the end of a shorter sequence
}

// Every tile of a head is in one strip.
void check_all_are_taken(int seqlen_q, int seqlen_k, const Bias& bias) {
  for (const int heads : {1, 3, 64}) {
    const Shape shape = shape_of(2, heads, seqlen_q, seqlen_k);
    const DbiasTiles tiles = tiles_of(shape, bias);
    const TileScheduler schedule = tiles.schedule(shape, bias.gradient());
    FA_EXPECT_EQ(tiles.query_tiles, bias.of_queries ? fa::ceil_div(seqlen_q, kTile) : 1);
    FA_EXPECT_EQ(tiles.key_tiles, bias.of_keys ? fa::ceil_div(seqlen_k, kTile) : 1);
    FA_EXPECT_EQ(schedule.heads, bias.of_heads ? heads : 1);
    FA_EXPECT_EQ(schedule.batch, bias.of_batch ? 2 : 1);
    std::vector<int> taken(static_cast<size_t>(tiles.query_tiles) * tiles.key_tiles);
    for (int item = 0; item < schedule.tiles; ++item) {
      const Range queries = tiles.queries(item);
      const bool fits = queries.begin >= 0 && queries.end <= tiles.query_tiles;
      FA_EXPECT(fits && !queries.empty() && queries.size() <= tiles.strip, "item", item);
      for (int tile = queries.begin; fits && tile < queries.end; ++tile) {
        ++taken[static_cast<size_t>(tiles.key_tile(item)) * tiles.query_tiles + tile];
      }
    }
    for (const int count : taken) {
      FA_EXPECT_EQ(count, 1);
    }
  }
}

void check_strip(const Shape& shape, const Bias& bias, int expected) {
  FA_EXPECT_EQ(tiles_of(shape, bias).strip, expected, "batch", shape.batch, "heads",
               shape.num_heads, "queries", shape.seqlen_q);
}

void check_strips() {
  check_strip(shape_of(4, 16, 4096, 4096), kWhole, 8);
  check_strip(shape_of(4, 16, 512, 4096), kWhole, 4);  // there are no more
  check_strip(shape_of(1, 2, 4096, 4096), kWhole, 3);  // 2048 tiles for 132 blocks
  check_strip(shape_of(1, 1, 512, 512), kWhole, 1);
  // Shared by all sequences, of which there may be one, or by all heads.
  const Bias of_heads = {false, true, true, true};
  check_strip(shape_of(4, 16, 4096, 4096), of_heads, 1);
  check_strip(shape_of(1, 64, 4096, 4096), of_heads, 8);
  const Bias of_batch = {true, false, true, true};
  check_strip(shape_of(64, 2, 4096, 4096), of_batch, 1);
  check_strip(shape_of(64, 1, 4096, 4096), of_batch, 8);
}

void check_nothing() {
  for (const Bias& bias : {kWhole, Bias{false, false, false, false}}) {
    for (const Shape& shape :
         {shape_of(0, 2, 300, 300), shape_of(2, 2, 0, 300), shape_of(2, 2, 300, 0)}) {
      FA_EXPECT_EQ(tiles_of(shape, bias).schedule(shape, bias.gradient()).count(), 0);
    }
  }
}

}  // namespace

int main() {
  check_ranges();
  for (int sizes = 0; sizes < 16; ++sizes) {
    const Bias bias = {(sizes & 1) != 0, (sizes & 2) != 0, (sizes & 4) != 0, (sizes & 8) != 0};
    check_all_are_taken(300, 1000, bias);
    check_all_are_taken(4096, 1, bias);
    check_all_are_taken(1500, 2000, bias);  // 12 tiles, 8 of them in a strip
    check_all_are_taken(1, 129, bias);
  }
  check_strips();
  check_nothing();
  return fa::test::report("common/test_dbias_tiles");
}
