// SPDX-License-Identifier: BSD-3-Clause
// What the blocks of the backward kernel work on.
#pragma once

#include "common/params.h"
#include "device/warpgroup_mma.cuh"
#include "device/work_order.cuh"
#include "sm90/schedule.cuh"

namespace fa::sm90 {

// A tile of keys, and the queries of every head that shares them.
struct BwdWork {
  WorkTile tile;  // of a head of keys
  Sequence queries;
  Sequence keys;
  WindowMask window;
  int first_key;
  Range seeing;              // queries that see at least one of the keys
  int64_t first_query_tile;  // of the sequence, among the tiles of all

  template <int kTileM, int kTileN>
  static FA_DEVICE BwdWork of_item(const BwdParams& params, const Schedule& schedule,
                                   uint32_t index) {
    const WorkTile tile = device::in_sequence(
        schedule.in_order ? schedule.tiles.last_first_of_group(index, schedule.head_group)
                          : schedule.tiles.first_first_of_group(index, schedule.head_group),
        params.keys, params.shape.batch, params.shape.seqlen_k, kTileN);
    const Sequence queries = params.queries.at(tile.batch, params.shape.seqlen_q);
    const Sequence keys = params.keys.at(tile.batch, params.shape.seqlen_k);
    const WindowMask window = params.window.over(queries.length, keys.length);
    const int first_key = tile.tile * kTileN;
    return {tile,
            queries,
            keys,
            window,
            first_key,
            window.queries_seeing_any({first_key, first_key + kTileN}),
            params.queries.first_tile(tile.batch, params.shape.seqlen_q, kTileM)};
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
  FA_DEVICE bool is_end() const { return tile.tile < 0; }

  template <int kTileM>
  FA_DEVICE QueryTiles query_tiles(const BwdParams& params) const {
    const int heads = params.shape.group_size();
    return {seeing, kTileM, tile.head * heads, heads};
  }
};

// The same in shared memory, with the queries that see every key of each part of 64.
template <int kParts>
struct SharedBwdWork : BwdWork {
  Range seeing_all[kParts];

  // By one warp, of which kParts lanes write.
  FA_DEVICE void write(const BwdParams&, const BwdWork& work) {
    const int part = ptx::lane_index();
    if (part == 0) {
      static_cast<BwdWork&>(*this) = work;
    }
    if (part < kParts) {
      const int first = work.first_key + part * device::kWarpgroupRows;
      seeing_all[part] = work.window.queries_seeing_all({first, first + device::kWarpgroupRows});
    }
  }
};

}  // namespace fa::sm90
