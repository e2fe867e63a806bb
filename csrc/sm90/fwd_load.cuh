// SPDX-License-Identifier: BSD-3-Clause
// The two loading warps of the forward kernel.
#pragma once

#include "sm90/fwd_work.cuh"
#include "sm90/give_out_work.cuh"
#include "sm90/load_rows.cuh"
#include "sm90/tensor_map.h"
#include "sm90/traits.h"

namespace fa::sm90 {

// What TMA must know of the tensors; q and out in boxes of a warpgroup's rows.
struct FwdTensorMaps {
  CUtensorMap q;
  CUtensorMap k;
  CUtensorMap v;
  CUtensorMap out;
};

// How many tiles of keys are left to load when the next item is taken: enough to find out what it
// is and to load its queries meanwhile.
inline constexpr int kTilesToTakeAhead = 3;

// Takes the work and loads queries, by one warp.
template <typename Traits>
FA_DEVICE void load_queries(const FwdParams& params, const FwdTensorMaps& maps,
                            const Schedule& schedule, typename Traits::SharedMemory& s) {
  device::RingPosition<Traits::kQStages> q_at;
  give_out_work<FwdWork, Traits>(params, schedule, s, [&](const FwdWork& work) {
    if (!work.key_tiles.empty()) {
#pragma unroll 1
      for (int warpgroup = 0; warpgroup < Traits::kMathWarpgroups; ++warpgroup) {
        const int row = warpgroup * device::kWarpgroupRows;
        load_rows<device::kWarpgroupRows>(s.q, row, s.q_ring[warpgroup], q_at, maps.q,
                                          work.queries.begin + work.first_query + row,
                                          work.tile.head, work.batch_of_queries(params));
      }
      q_at.advance();
    }
  });
}

// Loads keys and values, by one warp.
template <typename Traits>
FA_DEVICE void load_keys_and_values(const FwdParams& params, const FwdTensorMaps& maps,
                                    typename Traits::SharedMemory& s) {
  constexpr int kTileN = Traits::kTileN;
  device::RingPosition<kWorkStages> work_at;
  device::RingPosition<Traits::kKvStages> k_at;
  device::RingPosition<Traits::kKvStages> v_at;
  device::RingPosition<1> may_take_at;
  for (;; work_at.advance()) {
    work_at.wait(s.work_ring);
    const FwdWork& s_work = s.work[work_at.stage()];
    if (s_work.is_end()) {
      break;
    }
    const int head = ptx::uniform(s_work.tile.head / params.shape.group_size());
    const int batch = ptx::uniform(s_work.batch_of_keys(params));
    const int first_key = ptx::uniform(s_work.keys.begin);
    const int tiles_begin = ptx::uniform(s_work.key_tiles.begin);
    const int tiles_end = ptx::uniform(s_work.key_tiles.end);
    __syncwarp();
    work_at.release(s.work_ring);
    const auto load_keys = [&](int j) {
      load_rows<kTileN>(s.k, 0, s.k_ring, k_at, maps.k, first_key + j * kTileN, head, batch);
      k_at.advance();
    };
    const auto load_values = [&](int j) {
      load_rows<kTileN>(s.v, 0, s.v_ring, v_at, maps.v, first_key + j * kTileN, head, batch);
      v_at.advance();
    };
    const int take_next_at = max(tiles_end - kTilesToTakeAhead, tiles_begin);
    for (int j = tiles_begin; j <= tiles_end; ++j) {
      if (j == take_next_at && ptx::lane_index() == 0) {
        may_take_at.fill(s.may_take);
      }
      if (j < tiles_end) {
        load_keys(j);
      }
      if (j > tiles_begin) {
        load_values(j - 1);
      }
    }
  }
}

}  // namespace fa::sm90
