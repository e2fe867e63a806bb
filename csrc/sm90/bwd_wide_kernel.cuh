// SPDX-License-Identifier: BSD-3-Clause
// Backward on Hopper where head_dim is large: the same gradients from the same work as in
// bwd_kernel.cuh, by warpgroups that each do something else. A block has 64 keys at a time:
//   warpgroup 0 loads, as in bwd_kernel.cuh. Warpgroup 1 has the scores, (queries, keys), and makes
//   p and ds of them, which go to the others through shared memory, transposed. It computes dq of
//   a tile and adds it to the sums in global memory. Warpgroup 2 sums dv = p^T dout and warpgroup
//   3 sums dk = ds^T q, with all columns as their accumulators.
// So the exponentials of a tile run under the products of the tile before, and no warpgroup meets
// another.
//
// The rings, with who fills them and for whom:
//   work          warp 0        all others
//   k, v          warp 0        warpgroup 1, each free again after its own last product of an item
//   q             warp 1        warpgroups 1 and 3, and the rows' statistics for 1
//   dout          warp 1        warpgroups 1 and 2
//   p             warpgroup 1   warpgroup 2
//   ds            warpgroup 1   warpgroup 3, and 1 itself, which meets for that
//   turn          warp 2        warpgroup 1, to add to dq
//   added         warpgroup 1   warp 3
// The last six have a stage for each tile of queries and advance together.
//
// Additions to global memory leave at half the rate of the products that they come from, and hold
// their registers until they have left. So dq is computed in two shares of columns. The first is in
// the registers of scores and dp, and is added as soon as it is there. The last has registers of
// its own, and is added while the next tile's scores are computed.
//
// Deterministic: as in bwd_kernel.cuh.
#pragma once

#include "device/mask.cuh"
#include "ptx/barrier.cuh"
#include "sm90/bwd_dq.cuh"
#include "sm90/bwd_turns.cuh"
#include "sm90/bwd_wide_gradient.cuh"
#include "sm90/bwd_wide_load.cuh"

namespace fa::sm90 {

// Warpgroup 1.
template <typename Traits>
FA_DEVICE void differentiate_scores(const BwdParams& params, typename Traits::SharedMemory& s) {
  using Element = typename Traits::Element;
  using Scores = typename Traits::Scores;
  constexpr int kTileM = Traits::kTileM;
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kBarrier = 1;

  const int thread = static_cast<int>(threadIdx.x) % device::kWarpgroupThreads;
  const int warp_row = ptx::uniform(thread / ptx::kWarpSize) * device::kBlockRows;
  const float scale_log2 = static_cast<float>(params.softmax_scale) * kLog2E;

  device::RingPosition<kWorkStages> work_at;
  device::RingPosition<1> keys_at;
  device::RingPosition<kBwdStages> at;  // of q, statistics, dout, p and ds
  const auto release_work = [&] {
    __syncwarp();  // all lanes have read it
    work_at.release(s.work_ring);
    work_at.advance();
  };
  for (;; release_work()) {
    work_at.wait(s.work_ring);
    const auto& s_work = s.work[work_at.stage()];
    if (s_work.is_end()) {
      break;
    }
    QueryTiles tiles = s_work.template query_tiles<kTileM>(params);
    if (tiles.done()) {
      continue;
    }
    const auto index_of = [&](const QueryTile& tile) {
      return params.workspace.index(tile.head, s_work.first_query_tile + tile.tile);
    };
    // This lane's place in the tile of dq before the current one, and how many tiles on that is.
    float* g_dq = dq_lane<Traits>(params.workspace.dq_sum(index_of(tiles.current())), 0);
    int step = 0;

    keys_at.wait(s.k_ring);
    keys_at.wait(s.v_ring);

    typename Traits::LastDq r_last_dq;
    r_last_dq.clear();
    // Of the tile before the current one.
    const auto add_last_dq = [&] {
      add_dq<Traits>(g_dq + kFloatsOfDqShare<Traits>, 1, r_last_dq);
      __syncwarp();  // all lanes have added
      if (ptx::lane_index() == 0) {
        at.fill_previous(s.added_ring);
      }
    };
    at.wait(s.q_ring);
    for (; !tiles.done(); at.advance()) {
      const QueryTile tile = tiles.current();
      const int first_query = tile.tile * kTileM;
      auto& s_q = s.q[at.stage()];
      auto& s_dout = s.dout[at.stage()];
      const auto& s_statistics = s.statistics[at.stage()];
      const bool is_masked = !device::covers(
          s_work.seeing_all[0], {first_query, min(first_query + kTileM, s_work.queries.length)});

      ptx::wgmma_fence();
      Scores r_p;
      device::issue_abt<kHeadDim>(r_p, s_q, 0, s.k);
      ptx::wgmma_commit();
      at.wait(s.dout_ring);
      ptx::wgmma_fence();
      Scores r_ds;  // dp, then ds
      device::issue_abt<kHeadDim>(r_ds, s_dout, 0, s.v);
      ptx::wgmma_commit();
      // These too come before additions, behind which loads from shared memory queue up.
      typename Scores::RowValues lse_log2;
      typename Scores::RowValues delta;
#pragma unroll
      for (int row = 0; row < Scores::kRowsPerThread; ++row) {
        lse_log2[row] = s_statistics.lse_log2[warp_row + Scores::row(row)];
        delta[row] = s_statistics.delta[warp_row + Scores::row(row)];
      }

      if (step != 0) {
        add_last_dq();
      }

      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(r_p.r[0]);
      r_p.transform([&](float score, int row, int, int) {
        return ptx::exp2_approx(fmaf(score, scale_log2, -lse_log2[row]));
      });
      if (is_masked) {
        device::keep_visible_of_warp(r_p, s_work.window, first_query + warp_row, s_work.first_key,
                                     0.0f);
      }
      const auto r_p_elements = device::to_operand<Element>(r_p);
      at.wait_empty(s.p_ring);
      device::store_transposed(r_p_elements, s.p[at.stage()], warp_row);
      fill_for_wgmma(s.p_ring, at);
      // delta may be on its way: warpgroup 3 releases this stage too, after ds, which needs it.
      at.release(s.q_ring);

      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(r_ds.r[0]);
      at.release(s.dout_ring);
      if (tiles.left() == 1) {
        keys_at.release(s.v_ring);
      }
#pragma unroll
      for (int block = 0; block < Scores::kColBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& ds = r_ds.r[0][block][i];
          ds = r_p.r[0][block][i] * (ds - delta[i / 2]);
        }
      }
      if (is_masked) {  // dp of a hidden key may be infinite
        device::keep_visible_of_warp(r_ds, s_work.window, first_query + warp_row, s_work.first_key,
                                     0.0f);
      }
      const auto r_ds_elements = device::to_operand<Element>(r_ds);
      at.wait_empty(s.ds_ring);
      device::store_transposed(r_ds_elements, s.ds[at.stage()], warp_row);
      fill_for_wgmma(s.ds_ring, at);
      ptx::barrier_sync<device::kWarpgroupThreads>(kBarrier);  // this warpgroup reads ds too

      // The first share is added under the product of the last.
      typename Traits::Dq r_dq;
      ptx::wgmma_fence();
      device::issue_atb(r_dq, s.ds[at.stage()], s.k, Traits::dq_col(0));
      ptx::wgmma_commit();
      device::issue_atb(r_last_dq, s.ds[at.stage()], s.k, Traits::dq_col(1));
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(r_dq.r[0]);
      at.wait(s.turn_ring);
      tiles.advance();
      // Ahead of the additions, for they hold up what waits after them.
      if (!tiles.done()) {
        at.wait_next(s.q_ring);
      }
      // Not before: additions read it as they leave, and those of the tile before now have.
      g_dq += int64_t{step} * (kTileM * kHeadDim);
      add_dq<Traits>(g_dq, 0, r_dq);
      step = tiles.current().tile != tiles.first_of_head()
                 ? 1
                 : static_cast<int>(params.workspace.tiles) - tiles.of_head() + 1;
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(r_last_dq.r[0]);
    }
    keys_at.release(s.k_ring);
    keys_at.advance();
    add_last_dq();
  }
}

// How many tiles of queries those who sum dv and dk have yet to add.
struct CountedTiles {
  int left;

  FA_DEVICE bool done() const { return left <= 0; }
  FA_DEVICE void enter(int) { --left; }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    flash_bwd_wide_sm90(const __grid_constant__ BwdParams params,
                        const __grid_constant__ WideBwdTensorMaps maps, const Schedule schedule) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  auto& s = device::shared_memory<typename Traits::SharedMemory>();
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.dout}) {
      ptx::prefetch_tensor_map(map);
    }
    constexpr int kOne = Traits::kWarpgroupWarps;  // the warps of one
    constexpr int kHelpers = 3;                    // load queries, keep turns
    s.work_ring.init(Traits::kMathWarps + kHelpers, Traits::kMathWarpgroups);
    s.turn_ring.init(1);
    s.added_ring.init(1, kOne);
    s.may_take.init(1);
    s.k_ring.init(kOne);
    s.v_ring.init(kOne);
    s.q_ring.init(2 * kOne);
    s.dout_ring.init(2 * kOne);
    s.p_ring.init(kOne, kOne);
    s.ds_ring.init(kOne, kOne);
    for (auto& s_landing : s.landings) {
      s_landing.init(1);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::wait_for_previous_kernel();
  const auto tiles_of = [&](const device::RingPosition<kWorkStages>& work_at) {
    const BwdWork& s_work = s.work[work_at.stage()];
    return CountedTiles{ptx::uniform(s_work.query_tiles<Traits::kTileM>(params).left())};
  };
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / device::kWarpgroupThreads);
  if (warpgroup == 1) {
    ptx::grow_registers<Traits::kScoreRegisters>();
    differentiate_scores<Traits>(params, s);
  } else if (warpgroup == 2) {
    ptx::grow_registers<Traits::kGradientRegisters>();
    sum_key_gradient<Traits>(params, s, s.p, s.p_ring, s.dout, s.dout_ring, 1.0f, params.dv,
                             params.shape.head_dim_v, tiles_of);
  } else if (warpgroup == 3) {
    ptx::grow_registers<Traits::kGradientRegisters>();
    sum_key_gradient<Traits>(params, s, s.ds, s.ds_ring, s.q, s.q_ring,
                             static_cast<float>(params.softmax_scale), params.dk,
                             params.shape.head_dim, tiles_of);
  } else {
    ptx::shrink_registers<Traits::kProducerRegisters>();
    if (ptx::warp_index() == 0) {
      load_wide_keys<Traits>(params, maps, schedule, s);
    } else if (ptx::warp_index() == 1) {
      load_queries<Traits>(params, maps, s);
    } else {
      keep_turns<Traits>(params, s, ptx::warp_index() == 2);
    }
  }
#else
  __trap();  // rather than leave gradients out as they were
#endif
}

}  // namespace fa::sm90
