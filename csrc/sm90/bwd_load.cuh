// SPDX-License-Identifier: BSD-3-Clause
// The two loading warps of the backward kernel.
#pragma once

#include "sm90/bwd_traits.h"
#include "sm90/load_rows.cuh"
#include "sm90/shared_rows.cuh"
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

// How many of a tile's rows are loaded as they are. Rows past the end of a sequence are zero where
// the tensor ends there, and else what others left in them, NaN perhaps, which 0 must not multiply.
FA_DEVICE int rows_to_keep(const Sequences& sequences, const Sequence& sequence, int first,
                           int tile_rows) {
  const bool others_follow = sequences.cu_seqlens != nullptr || sequences.seqused != nullptr;
  return others_follow ? min(sequence.length - first, tile_rows) : tile_rows;
}

// Takes the work and loads keys and values, by one warp.
template <typename Traits>
FA_DEVICE void load_keys(const BwdParams& params, const BwdTensorMaps& maps,
                         const Schedule& schedule, typename Traits::SharedMemory& s) {
  device::RingPosition<Traits::kKeyStages> keys_at;
  Landing landing = {s.landings[0]};
  give_out_work<BwdWork, Traits>(params, schedule, s, [&](const BwdWork& work) {
    auto& s_keys = s.keys[keys_at.stage()];
    const int keep = rows_to_keep(params.keys, work.keys, work.first_key, Traits::kTileN);
    fill_stage(
        s.keys_ring, keys_at, sizeof(s_keys), keep < Traits::kTileN, landing,
        [&](uint64_t& s_barrier) {
          const int row = work.keys.begin + work.first_key;
          const int batch = work.batch_of_keys(params);
          copy_rows(s_keys.k, 0, s_barrier, maps.k, row, work.tile.head, batch);
          copy_rows(s_keys.v, 0, s_barrier, maps.v, row, work.tile.head, batch);
        },
        [&](int lane) {
          clear_rows<ptx::kWarpSize>(s_keys.k, keep, lane);
          clear_rows<ptx::kWarpSize>(s_keys.v, keep, lane);
        });
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
  Landing landing = {s.landings[1]};
  for (;; work_at.advance()) {
    work_at.wait(s.work_ring);
    const BwdWork& s_work = s.work[work_at.stage()];
    if (s_work.is_end()) {
      break;
    }
    QueryTiles tiles = s_work.query_tiles<kTileM>(params);
    const Sequence queries = {ptx::uniform(s_work.queries.begin),
                              ptx::uniform(s_work.queries.length)};
    const int batch = ptx::uniform(s_work.batch_of_queries(params));
    const int64_t first_tile = s_work.first_query_tile;
    __syncwarp();
    work_at.release(s.work_ring);
    int left = tiles.left();
    const int take_next_at = min(left, kQueryTilesToTakeAhead);
    for (;; --left) {
      if (left == take_next_at && ptx::lane_index() == 0) {
        may_take_at.fill(s.may_take);
      }
      if (left == 0) {
        break;
      }
      const QueryTile tile = tiles.current();
      const int row = queries.begin + tile.tile * kTileM;
      const int keep = rows_to_keep(params.queries, queries, tile.tile * kTileM, kTileM);
      auto& s_q = s.q[at.stage()];
      auto& s_dout = s.dout[at.stage()];
      auto& s_statistics = s.statistics[at.stage()];
      fill_stage(
          s.q_ring, at, sizeof(s_q) + sizeof(s_statistics), keep < kTileM, landing,
          [&](uint64_t& s_barrier) {
            const int64_t index = params.workspace.index(tile.head, first_tile + tile.tile);
            copy_rows(s_q, 0, s_barrier, maps.q, row, tile.head, batch);
            ptx::bulk_load(&s_statistics, params.workspace.lse_log2(index), sizeof(s_statistics),
                           s_barrier);
          },
          [&](int lane) { clear_rows<ptx::kWarpSize>(s_q, keep, lane); });
      fill_stage(
          s.dout_ring, at, sizeof(s_dout), keep < kTileM, landing,
          [&](uint64_t& s_barrier) {
            copy_rows(s_dout, 0, s_barrier, maps.dout, row, tile.head, batch);
          },
          [&](int lane) { clear_rows<ptx::kWarpSize>(s_dout, keep, lane); });
      tiles.advance();
      at.advance();
    }
  }
}

}  // namespace fa::sm90
