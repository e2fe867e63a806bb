// SPDX-License-Identifier: BSD-3-Clause
// What those who load tell those who compute of a tile of queries, beside the tile itself.
#pragma once

#include "common/scheduler.h"
#include "common/types.h"

namespace fa {

struct ToldTile {
  int index;  // in the workspace, of which each has some kilobytes
  int head;
  int bits;

  FA_HOST_DEVICE static constexpr ToldTile of(int index, const QueryTile& tile, bool is_mixed,
                                              bool is_last) {
    return {index, tile.head, tile.tile * 4 + (is_mixed ? 2 : 0) + (is_last ? 1 : 0)};
  }
  FA_HOST_DEVICE constexpr int tile() const { return bits / 4; }
  // Whether some of its pairs may be hidden, or do not exist.
  FA_HOST_DEVICE constexpr bool is_mixed() const { return (bits & 2) != 0; }
  FA_HOST_DEVICE constexpr bool is_last() const { return (bits & 1) != 0; }
};

}  // namespace fa
