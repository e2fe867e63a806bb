// SPDX-License-Identifier: BSD-3-Clause
// What a CUDA backward pass keeps in global memory while it runs: for each tile of queries of each
// head, the sum of dq over the blocks that contribute, and what every block must know of the rows.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fa {

struct BwdWorkspace {
  float* dq_sums = nullptr;     // (num_heads, tiles, tile_m * head_dim), without softmax_scale
  float* statistics = nullptr;  // (num_heads, tiles, 2, tile_m): lse in octaves, then delta
  // Null unless deterministic. A 64-bit number of work items begun, then (num_heads, tiles): how
  // many blocks have added to a tile.
  int32_t* turns = nullptr;
  int64_t tiles = 0;  // of one head, over all sequences
  int tile_m = 0;
  int head_dim = 0;  // of the kernel's row

  static constexpr int kTicketInts = sizeof(unsigned long long) / sizeof(int32_t);

  static constexpr int64_t floats(int64_t all_tiles, int tile_m, int head_dim, bool deterministic) {
    return all_tiles * tile_m * (head_dim + 2) + (deterministic ? all_tiles + kTicketInts : 0);
  }

  // Cuts `memory`, of floats(num_heads * tiles, ...) floats aligned to 16 bytes.
  static BwdWorkspace in(float* memory, int64_t num_heads, int64_t tiles, int tile_m, int head_dim,
                         bool deterministic) {
    const int64_t all_tiles = num_heads * tiles;
    BwdWorkspace workspace;
    workspace.dq_sums = memory;
    workspace.statistics = memory + all_tiles * tile_m * head_dim;
    if (deterministic) {
      workspace.turns = reinterpret_cast<int32_t*>(workspace.statistics + all_tiles * tile_m * 2);
    }
    workspace.tiles = tiles;
    workspace.tile_m = tile_m;
    workspace.head_dim = head_dim;
    return workspace;
  }

  FA_HOST_DEVICE unsigned long long* ticket() const {
    return reinterpret_cast<unsigned long long*>(turns);
  }
  FA_HOST_DEVICE constexpr int32_t* turn(int64_t index) const {
    return turns == nullptr ? nullptr : turns + kTicketInts + index;
  }

  // The number of a head's tile, given its number among the tiles of all sequences.
  FA_HOST_DEVICE constexpr int64_t index(int64_t head, int64_t tile) const {
    return head * tiles + tile;
  }
  FA_HOST_DEVICE constexpr float* dq_sum(int64_t index) const {
    return dq_sums + index * tile_m * head_dim;
  }
  FA_HOST_DEVICE constexpr float* lse_log2(int64_t index) const {
    return statistics + index * 2 * tile_m;
  }
  FA_HOST_DEVICE constexpr float* delta(int64_t index) const { return lse_log2(index) + tile_m; }
};

}  // namespace fa
