// SPDX-License-Identifier: BSD-3-Clause
// The two loading warps of the backward kernel.
#pragma once

#include "sm90/bwd_traits.h"
#include "sm90/load_rows.cuh"
#include "sm90/tensor_map.h"

namespace fa::sm90 {

// What TMA must know of the tensors: q and dout in boxes of a tile's rows, k and v too, dk and dv
// in boxes of a warpgroup's.
struct BwdTensorMaps {
  CUtensorMap q;
  CUtensorMap k;
  CUtensorMap v;
  CUtensorMap dout;
  CUtensorMap dk;
  CUtensorMap dv;
};

// How many tiles of queries are left to load when the next item is taken: enough to find out what
// it is and to load its keys and values meanwhile.
inline constexpr int kQueryTilesToTakeAhead = 4;

// Takes the work and loads keys and values, by one warp.
template <typename Traits>
FA_DEVICE void load_keys(const BwdParams& params, const BwdTensorMaps& maps,
                         const Schedule& schedule, typename Traits::SharedMemory& s) {
  device::RingPosition<kBwdStages> keys_at;
  give_out_work<BwdWork, Traits>(params, schedule, s, [&](const BwdWork& work) {
    keys_at.wait_empty(s.keys_ring);
    if (ptx::lane_index() == 0) {
      uint64_t& s_full = keys_at.expect(s.keys_ring, sizeof(typename Traits::Keys));
      auto& s_keys = s.keys[keys_at.stage()];
      const int row = work.keys.begin + work.first_key;
      const int batch = work.batch_of_keys(params);
      copy_rows(s_keys.k, 0, s_full, maps.k, row, work.tile.head, batch);
      copy_rows(s_keys.v, 0, s_full, maps.v, row, work.tile.head, batch);
    }
    __syncwarp();
    keys_at.advance();
  });
}

// Loads the queries that see the keys, dout and the rows' statistics, by one warp.
template <typename Traits, typename Maps>
FA_DEVICE void load_queries(const BwdParams& params, const Maps& maps,
                            typename Traits::SharedMemory& s) {
  constexpr int kTileM = Traits::kTileM;
  device::RingPosition<kWorkStages> work_at;
  device::RingPosition<kBwdStages> at;
  device::RingPosition<1> may_take_at;
  for (;; work_at.advance()) {
    work_at.wait(s.work_ring);
    const BwdWork& s_work = s.work[work_at.stage()];
    if (s_work.is_end()) {
      break;
    }
    QueryTiles tiles = s_work.query_tiles<kTileM>(params);
    const int first_row = ptx::uniform(s_work.queries.begin);
    const int batch = ptx::uniform(s_work.batch_of_queries(params));
    const int64_t first_tile = s_work.first_query_tile;
    __syncwarp();
    work_at.release(s.work_ring);
    const int count = tiles.left();
    const int take_next_at = max(count - kQueryTilesToTakeAhead, 0);
    for (int i = 0; i <= count; ++i) {
      if (i == take_next_at && ptx::lane_index() == 0) {
        may_take_at.fill(s.may_take);
      }
      if (i == count) {
        break;
      }
      const QueryTile tile = tiles.current();
      const int row = first_row + tile.tile * kTileM;
      at.wait_empty(s.q_ring);
      if (ptx::lane_index() == 0) {
        auto& s_statistics = s.statistics[at.stage()];
        uint64_t& s_full = at.expect(s.q_ring, sizeof(s.q[0]) + sizeof(s_statistics));
        copy_rows(s.q[at.stage()], 0, s_full, maps.q, row, tile.head, batch);
        ptx::bulk_load(
            &s_statistics,
            params.workspace.lse_log2(params.workspace.index(tile.head, first_tile + tile.tile)),
            sizeof(s_statistics), s_full);
      }
      __syncwarp();
      load_rows<kTileM>(s.dout, 0, s.dout_ring, at, maps.dout, row, tile.head, batch);
      tiles.advance();
      at.advance();
    }
  }
}

}  // namespace fa::sm90
