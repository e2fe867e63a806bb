// SPDX-License-Identifier: BSD-3-Clause
// How the blocks of a launch share its work.
#pragma once

#include "common/params.h"
#include "common/scheduler.h"
#include "ptx/common.cuh"

namespace fa::sm90 {

// The tiles of all sequences: of each batch entry, or numbered through the packed ones, of which
// some numbers belong to no sequence.
FA_HOST_DEVICE constexpr TileScheduler tiles_of_sequences(const Sequences& sequences, int batch,
                                                          int seqlen, int tile_rows, int heads) {
  if (sequences.cu_seqlens == nullptr) {
    return {ceil_div(seqlen, tile_rows), heads, batch};
  }
  const int64_t tiles = sequences.count_tiles(batch, sequences.packed_rows, seqlen, tile_rows);
  return {static_cast<int>(tiles), heads, 1};
}

// One of those by its sequence and its number there, which may be before the first tile of the
// sequence or past the last.
FA_HOST_DEVICE constexpr WorkTile tile_of_sequence(const WorkTile& tile, const Sequences& sequences,
                                                   int batch, int seqlen, int tile_rows) {
  if (sequences.cu_seqlens == nullptr) {
    return tile;
  }
  const auto found = sequences.tile_of_number(tile.tile, batch, seqlen, tile_rows);
  return {found.tile, tile.head, found.batch};
}

// Items are numbered in the order in which they should begin. The first item of a block has the
// block's own index, and further ones it takes from the counter, which is null where there are no
// more items than blocks. Or, in_order, it takes all of them: then an item begins after all items
// of lower number, in whatever order the hardware starts the blocks.
struct Schedule {
  TileScheduler tiles;
  uint32_t items;  // and as many more as there are blocks fit 32 bits
  int head_group;
  WorkCounter* counter;
  bool in_order = false;
};

// By one thread: the index of an item that no other block has, or one past the last.
FA_DEVICE uint32_t take_item(const Schedule& schedule) {
  const uint32_t own_items = schedule.in_order ? 0 : ptx::grid_size();
  return schedule.counter == nullptr ? ptx::opaque(schedule.items)
                                     : own_items + atomicAdd(&schedule.counter->taken, 1u);
}

// The same for a block's first item.
FA_DEVICE uint32_t take_first_item(const Schedule& schedule) {
  return schedule.in_order ? take_item(schedule) : blockIdx.x;
}

// By one thread of each block, when there are no more items: the last one leaves the counter as it
// was found.
FA_DEVICE void finish_taking(const Schedule& schedule) {
  if (schedule.counter == nullptr) {
    return;
  }
  __threadfence();
  if (atomicAdd(&schedule.counter->finished, 1u) + 1 == gridDim.x) {
    *schedule.counter = {};
  }
}

}  // namespace fa::sm90
