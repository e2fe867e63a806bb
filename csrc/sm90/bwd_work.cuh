// SPDX-License-Identifier: BSD-3-Clause
// What the blocks of the backward kernel work on.
#pragma once

#include "common/params.h"
#include "device/warpgroup_mma.cuh"
#include "sm90/schedule.cuh"

namespace fa::sm90 {

// A tile of keys, and the queries of every head that shares them.
template <int kWarpgroups>
struct SharedBwdWork {
  WorkTile tile;  // of a head of keys
  Sequence queries;
  Sequence keys;
  WindowMask window;
  int first_key;
  int64_t first_query_tile;       // of the sequence, among the tiles of all
  Range seeing;                   // queries that see at least one of the keys
  Range seeing_all[kWarpgroups];  // queries that see every key of a math warpgroup

  // By one warp. What comes later is read back from shared memory, for the warps that load have few
  // registers.
  template <int kTileM, int kTileN>
  FA_DEVICE void describe(const BwdParams& params, const Schedule& schedule, uint32_t item) {
    const bool writes = ptx::lane_index() == 0;
    if (writes) {
      tile = schedule.tiles.first_first_of_group(item, schedule.head_group);
    }
    __syncwarp();
    if (writes) {
      queries = params.queries.at(tile.batch, params.shape.seqlen_q);
      keys = params.keys.at(tile.batch, params.shape.seqlen_k);
      first_key = tile.tile * kTileN;
    }
    __syncwarp();
    if (writes) {
      first_query_tile = params.queries.first_tile(tile.batch, params.shape.seqlen_q, kTileM);
    }
    __syncwarp();
    if (writes) {
      window = params.window.over(queries.length, keys.length);
    }
    __syncwarp();
    if (writes) {
      seeing = window.queries_seeing_any({first_key, first_key + kTileN});
    }
    __syncwarp();
    const int warpgroup = ptx::lane_index();
    if (warpgroup < kWarpgroups) {
      const int first = first_key + warpgroup * device::kWarpgroupRows;
      seeing_all[warpgroup] = window.queries_seeing_all({first, first + device::kWarpgroupRows});
    }
    __syncwarp();
  }

  // Where TMA finds the sequences: packed ones are all in one batch entry.
  FA_DEVICE int batch_of_queries(const BwdParams& params) const {
    return params.queries.cu_seqlens == nullptr ? tile.batch : 0;
  }
  FA_DEVICE int batch_of_keys(const BwdParams& params) const {
    return params.keys.cu_seqlens == nullptr ? tile.batch : 0;
  }

  FA_DEVICE bool exists() const { return first_key < keys.length; }

  // Stands behind the last item.
  FA_DEVICE void describe_end() { tile.tile = -1; }
  FA_DEVICE bool is_end() const { return tile.tile < 0; }

  template <int kTileM>
  FA_DEVICE QueryTiles query_tiles(const BwdParams& params) const {
    const int heads = params.shape.group_size();
    return {seeing, kTileM, tile.head * heads, heads};
  }
};

}  // namespace fa::sm90
