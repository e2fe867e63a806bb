// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "common/params.h"

namespace fa::support {

// What a tile map is made of.
struct TileMapParams {
  ScoreRules rules;
  WindowMask window;
  Shape shape;
  Sequences queries;
  Sequences keys;
  PairBits pair_bits;  // of the first mask, or null
  TileMap map;
  int tile_m;
  int tile_n;
};

void launch_tile_map(const TileMapParams& params, void* stream);

// Before the kernel of a row that has tiles of this size; nothing where no data hide keys. Params:
// of a pass.
template <typename Params>
void fill_tile_map(const Params& params, int tile_m, int tile_n, void* stream) {
  if (params.tile_map.classes != nullptr) {
    launch_tile_map({params.rules, params.window, params.shape, params.queries, params.keys,
                     params.pair_bits, params.tile_map, tile_m, tile_n},
                    stream);
  }
}

}  // namespace fa::support
