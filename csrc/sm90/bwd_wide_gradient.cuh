// SPDX-License-Identifier: BSD-3-Clause
// What the wide backward kernels, plain and general, do with p and ds.
#pragma once

#include "device/store_rows.cuh"
#include "sm90/bwd_wide_traits.h"

namespace fa::sm90 {

// By all lanes of each warp that has written its part of a stage: shows it to wgmma of others.
template <int kStages>
FA_DEVICE void fill_for_wgmma(device::Ring<kStages>& s_ring,
                              const device::RingPosition<kStages>& at) {
  ptx::fence_async_proxy();
  __syncwarp();
  if (ptx::lane_index() == 0) {
    at.fill(s_ring);
  }
}

// Warpgroups 2 and 3: gradient (keys, columns) = scale * scores^T rows, of scores and rows that
// come through rings. tiles_of(work_at): what tells whether there are tiles of queries left of the
// work: done(), and enter(stage) when a tile is there.
template <typename Traits, typename TilesOf>
FA_DEVICE void sum_key_gradient(
    const BwdParams& params, typename Traits::SharedMemory& s,
    const typename Traits::ScoreTile (&s_scores)[kBwdStages],
    device::Ring<kBwdStages>& s_scores_ring,
    const typename Traits::template Rows<Traits::kTileM> (&s_rows)[kBwdStages],
    device::Ring<kBwdStages>& s_rows_ring, float scale, const TensorView& gradient,
    int gradient_cols, TilesOf&& tiles_of) {
  using Element = typename Traits::Element;
  device::RingPosition<kWorkStages> work_at;
  device::RingPosition<kBwdStages> at;
  for (;; work_at.advance()) {
    work_at.wait(s.work_ring);
    const auto& s_work = s.work[work_at.stage()];
    if (s_work.is_end()) {
      break;
    }
    auto tiles = tiles_of(work_at);
    typename Traits::KeyGradient r_gradient;
    r_gradient.clear();
    while (!tiles.done()) {
      at.wait(s_scores_ring);
      at.wait(s_rows_ring);
      tiles.enter(at.stage());
      ptx::wgmma_fence();
      device::issue_ab<Traits::kTileM, Traits::kColsAtOnce>(r_gradient, s_scores[at.stage()], 0,
                                                            s_rows[at.stage()], 0, true);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(r_gradient.r[0]);
      at.release(s_scores_ring);
      at.release(s_rows_ring);
      at.advance();
    }
    const auto destination = device::global_tile<Element>(
        gradient, s_work.keys, s_work.tile.batch,
        s_work.first_key + ptx::warp_index() % Traits::kWarpgroupWarps * device::kBlockRows,
        s_work.tile.head, gradient_cols);
    __syncwarp();  // all lanes have read s_work
    work_at.release(s.work_ring);
    device::store_rows<Traits::kHeadDim>(destination, [&](int block, int half) {
      const float (&r)[4] = r_gradient.r[0][block];
      return ptx::convert_pair<Element>(scale * r[2 * half], scale * r[2 * half + 1]);
    });
  }
}

}  // namespace fa::sm90
