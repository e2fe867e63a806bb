// SPDX-License-Identifier: BSD-3-Clause
// What the blocks of the forward kernel work on.
#pragma once

#include "common/key_tiles.h"
#include "common/params.h"
#include "device/warpgroup_mma.cuh"
#include "device/work_order.cuh"
#include "sm90/schedule.cuh"

namespace fa::sm90 {

// A tile of queries and the tiles of keys that it sees.
struct FwdWork {
  WorkTile tile;
  Sequence queries;  // up to the last one of the tile
  Sequence keys;
  WindowMask window;
  int first_query;
  Range key_tiles;

  template <int kTileM, int kTileN>
  static FA_DEVICE FwdWork of_item(const FwdParams& params, const Schedule& schedule,
                                   uint32_t index) {
    const WorkTile tile =
        device::in_sequence(schedule.tiles.last_first_of_group(index, schedule.head_group),
                            params.queries, params.shape.batch, params.shape.seqlen_q, kTileM);
    const Sequence all_queries = params.queries.at(tile.batch, params.shape.seqlen_q);
    const Sequence keys = params.keys.at(tile.batch, params.shape.seqlen_k);
    const WindowMask window = params.window.over(all_queries.length, keys.length);
    const Range queries = queries_of_tile(tile.tile, all_queries.length, kTileM);
    const Sequence up_to_end = {all_queries.begin, queries.end};
    const Range key_tiles = KeyTiles::of(window, queries, kTileN).seen;
    return {tile, up_to_end, keys, window, queries.begin, key_tiles};
  }

  // Where TMA finds the sequences: packed ones are all in one batch entry.
  FA_DEVICE int batch_of_queries(const FwdParams& params) const {
    return params.queries.cu_seqlens == nullptr ? tile.batch : 0;
  }
  FA_DEVICE int batch_of_keys(const FwdParams& params) const {
    return params.keys.cu_seqlens == nullptr ? tile.batch : 0;
  }

  FA_DEVICE bool exists() const { return first_query < queries.length; }

  // Stands behind the last item.
  FA_DEVICE bool is_end() const { return tile.tile < 0; }
};

// The same in shared memory, with what each math warpgroup sees.
template <int kWarpgroups, int kTileN>
struct SharedFwdWork : FwdWork {
  KeyTiles of_warpgroup[kWarpgroups];
  float* lse;  // of the sequence's first query

  // By one warp, of which as many lanes write as there are math warpgroups.
  FA_DEVICE void write(const FwdParams& params, const FwdWork& work) {
    const int warpgroup = ptx::lane_index();
    if (warpgroup == 0) {
      static_cast<FwdWork&>(*this) = work;
      lse = params.softmax_lse.row<float>(work.tile.batch, work.tile.head) + work.queries.begin;
    }
    if (warpgroup < kWarpgroups) {
      const int first = work.first_query + warpgroup * device::kWarpgroupRows;
      const int end = min(first + device::kWarpgroupRows, work.queries.length);
      of_warpgroup[warpgroup] = KeyTiles::of(work.window, {first, end}, kTileN);
    }
  }
};

}  // namespace fa::sm90
