// SPDX-License-Identifier: BSD-3-Clause
// What is told of a tile of queries is what was to be told.
#include "common/told_tile.h"

#include "common/window.h"
#include "tests/support/check.h"

namespace {

using fa::ToldTile;

void check_told(int index, int head, int tile) {
  for (const bool is_mixed : {false, true}) {
    for (const bool is_last : {false, true}) {
      const ToldTile told = ToldTile::of(index, {head, tile}, is_mixed, is_last);
      FA_EXPECT_EQ(told.index, index);
      FA_EXPECT_EQ(told.head, head);
      FA_EXPECT_EQ(told.tile(), tile);
      FA_EXPECT_EQ(told.is_mixed(), is_mixed);
      FA_EXPECT_EQ(told.is_last(), is_last);
    }
  }
}

}  // namespace

int main() {
  constexpr int kFewestRows = 16;  // of a tile of queries
  for (const int tile : {0, 1, 2, 3, 1000, fa::kMaxSeqlen / kFewestRows - 1}) {
    check_told(0, 0, tile);
    check_told(7, 65535, tile);
    check_told(2147483647, 1, tile);
  }
  return fa::test::report("common/test_told_tile");
}
