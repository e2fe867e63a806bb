// SPDX-License-Identifier: BSD-3-Clause
// What the wide backward kernel loads otherwise than its narrow neighbour.
#pragma once

#include "sm90/bwd_load.cuh"
#include "sm90/bwd_wide_traits.h"

namespace fa::sm90 {

// In boxes of a tile's rows.
struct WideBwdTensorMaps {
  CUtensorMap q;
  CUtensorMap k;
  CUtensorMap v;
  CUtensorMap dout;
};

// Takes the work and loads the keys and values, where they are needed, by one warp. They are free
// one after the other, values first.
template <typename Traits, typename Maps>
FA_DEVICE void load_wide_keys(const BwdParams& params, const Maps& maps, const Schedule& schedule,
                              typename Traits::SharedMemory& s) {
  device::RingPosition<1> at;
  Landing landing = {s.landings[0]};
  give_out_work<BwdWork, Traits>(params, schedule, s, [&](const BwdWork& work) {
    if (!Traits::needs_keys(work)) {
      return;
    }
    const int keep = rows_to_keep(params.keys, work.keys, work.first_key, Traits::kTileN);
    const auto load = [&](auto& s_tile, device::Ring<1>& s_ring, const CUtensorMap& map) {
      fill_stage(
          s_ring, at, sizeof(s_tile), keep < Traits::kTileN, landing,
          [&](uint64_t& s_barrier) {
            copy_rows(s_tile, 0, s_barrier, map, work.keys.begin + work.first_key, work.tile.head,
                      work.batch_of_keys(params));
          },
          [&](int lane) { clear_rows<ptx::kWarpSize>(s_tile, keep, lane); });
    };
    load(s.v, s.v_ring, maps.v);
    load(s.k, s.k_ring, maps.k);
    at.advance();
  });
}

}  // namespace fa::sm90
