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

// Takes the work and loads the keys and values that some query sees, by one warp. They are free
// one after the other, values first.
template <typename Traits>
FA_DEVICE void load_wide_keys(const BwdParams& params, const WideBwdTensorMaps& maps,
                              const Schedule& schedule, typename Traits::SharedMemory& s) {
  device::RingPosition<1> at;
  const auto load = [&](auto& s_tile, device::Ring<1>& s_ring, const CUtensorMap& map, int row,
                        int head, int batch) {
    at.wait_empty(s_ring);
    if (ptx::lane_index() == 0) {
      copy_rows(s_tile, 0, at.expect(s_ring, sizeof(s_tile)), map, row, head, batch);
    }
    __syncwarp();
  };
  give_out_work<BwdWork, Traits>(params, schedule, s, [&](const BwdWork& work) {
    if (work.seeing.empty()) {
      return;
    }
    const int row = work.keys.begin + work.first_key;
    const int head = work.tile.head;
    const int batch = work.batch_of_keys(params);
    load(s.v, s.v_ring, maps.v, row, head, batch);
    load(s.k, s.k_ring, maps.k, row, head, batch);
    at.advance();
  });
}

}  // namespace fa::sm90
