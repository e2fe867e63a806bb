// SPDX-License-Identifier: BSD-3-Clause
// Work item i -> (tile, head, batch). Tiles of one head are neighbours, so that blocks that run
// together read the same keys and values through L2.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fa {

struct WorkTile {
  int tile;
  int head;
  int batch;
};

struct TileScheduler {
  int tiles;  // per head
  int heads;
  int batch;

  FA_HOST_DEVICE constexpr int64_t count() const { return int64_t{tiles} * heads * batch; }

  FA_HOST_DEVICE constexpr WorkTile at(int64_t index) const {
    const int64_t head_index = index / tiles;
    return {static_cast<int>(index % tiles), static_cast<int>(head_index % heads),
            static_cast<int>(head_index / heads)};
  }
};

}  // namespace fa
