// SPDX-License-Identifier: BSD-3-Clause
// Backward on Hopper, after support/bwd_preprocess. With p = exp(scale * q k^T - lse),
// dp = dout v^T and ds = p * (dp - delta),
//   dv = p^T dout,  dk = scale * ds^T q,  dq = scale * ds k.
// As many blocks as multiprocessors take tiles of keys of one head until none is left, and walk the
// tiles of queries that see them, of every head of queries that shares those keys. In a block,
//   warpgroup 0 loads: one of its warps takes the work, tells of it through a ring, and has TMA
//   copy keys and values. Another has TMA copy queries, dout and their rows' statistics. Two keep
//   the turns to add to dq, if there are any. The other warpgroups compute: each owns 64 keys,
//   whose dk and dv are its accumulators. It has scores and ds transposed, (keys, queries), so that
//   p and ds go from accumulators to A operands without leaving the lane.
//
// For dq, ds of all keys comes together in shared memory, in a ring that both math warpgroups fill.
// Each takes its share of a tile's dq from there a tile late, when the other has long written its
// part: so neither waits for the other there. Instead they take turns at the exponentials, so that
// those of one run under the products of the other. Each adds its share to sums in global memory,
// which flash_bwd_dq_sm90 then writes out.
//
// Deterministic: blocks add to a tile of dq in turn, as bwd_turns.cuh tells.
#pragma once

#include "device/mask.cuh"
#include "ptx/barrier.cuh"
#include "sm90/bwd_dq.cuh"
#include "sm90/bwd_load.cuh"
#include "sm90/bwd_turns.cuh"
#include "sm90/column_values.cuh"
#include "sm90/store.cuh"
#include "sm90/turns.cuh"

namespace fa::sm90 {

// A math warpgroup.
template <typename Traits>
FA_DEVICE void differentiate(const BwdParams& params, const BwdTensorMaps& maps,
                             typename Traits::SharedMemory& s, int warpgroup) {
  using Element = typename Traits::Element;
  using Scores = typename Traits::Scores;
  using KeyGradient = typename Traits::KeyGradient;
  using Dq = typename Traits::Dq;
  constexpr int kTileM = Traits::kTileM;
  constexpr int kTileN = Traits::kTileN;
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kMathThreads = Traits::kMathThreads;
  constexpr int kMathBarrier = 1;

  const int thread = static_cast<int>(threadIdx.x) % device::kWarpgroupThreads;
  const int warpgroup_barrier = 2 + warpgroup;
  constexpr int kFirstTurn = 2 + Traits::kMathWarpgroups;  // the barriers after those
  const int warpgroup_row = warpgroup * device::kWarpgroupRows;
  const int warp_row = warpgroup_row + ptx::uniform(thread / ptx::kWarpSize) * device::kBlockRows;
  const float softmax_scale = static_cast<float>(params.softmax_scale);
  const float scale_log2 = softmax_scale * kLog2E;
  const bool is_deterministic = params.workspace.turns != nullptr;
  const Turns<Traits::kMathWarpgroups, kFirstTurn> turns(warpgroup);
  device::RingPosition<kWorkStages> work_at;
  device::RingPosition<Traits::kKeyStages> keys_at;
  device::RingPosition<kBwdStages> at;  // of q and statistics, of dout, and of ds
  // dk and dv leave from the shared memory of their keys, and that is free when TMA has read them.
  bool is_leaving = false;
  device::RingPosition<Traits::kKeyStages> keys_left;
  const auto finish_store = [&] {
    if (is_leaving) {
      if (thread == 0) {
        ptx::tma_wait_read();
      }
      keys_left.release(s.keys_ring);
    }
    is_leaving = false;
  };

  for (;; work_at.release(s.work_ring), work_at.advance()) {
    work_at.wait(s.work_ring);
    const auto& s_work = s.work[work_at.stage()];
    if (s_work.is_end()) {
      break;
    }
    const int first_key = ptx::uniform(s_work.first_key);
    const Range seeing_all = {ptx::uniform(s_work.seeing_all[warpgroup].begin),
                              ptx::uniform(s_work.seeing_all[warpgroup].end)};
    const int seqlen_q = ptx::uniform(s_work.queries.length);
    const int64_t first_query_tile = s_work.first_query_tile;
    auto& s_k = s.keys[keys_at.stage()].k;
    auto& s_v = s.keys[keys_at.stage()].v;
    keys_at.wait(s.keys_ring);

    KeyGradient r_dk;  // without softmax_scale
    KeyGradient r_dv;
    r_dk.clear();
    r_dv.clear();
    QueryTiles tiles = s_work.template query_tiles<kTileM>(params);
    QueryTile late = {-1, 0};  // the tile before, of which dq is still to be added; if any
    const auto issue_dq = [&](Dq& r_dq) {
      at.wait_previous(s.ds_ring);
      ptx::wgmma_fence();
      device::issue_ab<kTileN>(r_dq, s.ds[at.previous_stage()], Traits::dq_row(warpgroup), s_k,
                               Traits::dq_col(warpgroup));
      ptx::wgmma_commit();
    };
    const auto finish_dq = [&](Dq& r_dq) {
      at.release_previous(s.ds_ring);
      if (is_deterministic) {
        at.wait_previous(s.turn_ring);
      }
      const int64_t index = params.workspace.index(late.head, first_query_tile + late.tile);
      add_dq<Traits>(dq_lane<Traits>(params.workspace.dq_sum(index), warpgroup), warpgroup, r_dq);
      if (is_deterministic) {
        __syncwarp();  // all lanes have added
        if (ptx::lane_index() == 0) {
          at.fill_previous(s.added_ring);
        }
      }
    };

    if (!tiles.done()) {
      at.wait(s.q_ring);
      at.wait(s.dout_ring);
    }
    while (!tiles.done()) {
      const QueryTile tile = tiles.current();
      const int first_query = tile.tile * kTileM;
      auto& s_q = s.q[at.stage()];
      auto& s_dout = s.dout[at.stage()];
      const auto& s_statistics = s.statistics[at.stage()];
      tiles.advance();

      Scores r_p;
      ptx::wgmma_fence();
      device::issue_abt<kHeadDim>(r_p, s_k, warpgroup_row, s_q);
      ptx::wgmma_commit();
      Scores r_ds;  // dp, then ds
      ptx::wgmma_fence();
      device::issue_abt<kHeadDim>(r_ds, s_v, warpgroup_row, s_dout);
      ptx::wgmma_commit();

      ColumnValues<Scores> lse_log2;
      if (Traits::kLoadsStatisticsAhead) {
        lse_log2.load(s_statistics.lse_log2);
      }
      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(r_p.r[0]);
      turns.begin();
      if (!Traits::kLoadsStatisticsAhead) {
        lse_log2.load(s_statistics.lse_log2);
      }
      r_p.transform([&](float score, int, int block, int i) {
        return ptx::exp2_approx(fmaf(score, scale_log2, -lse_log2.of(block, i)));
      });
      const bool is_masked =
          !device::covers(seeing_all, {first_query, min(first_query + kTileM, seqlen_q)});
      if (is_masked) {
        device::keep_seeing_of_warp(r_p, s_work.window, first_key + warp_row, first_query, 0.0f);
      }
      const auto r_p_elements = device::to_operand<Element>(r_p);

      ColumnValues<Scores> delta;
      if (Traits::kLoadsStatisticsAhead) {
        delta.load(s_statistics.delta);
      }
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(r_ds.r[0]);
      if (!Traits::kLoadsStatisticsAhead) {
        delta.load(s_statistics.delta);
      }
      r_ds.transform([&](float dp, int, int block, int i) {
        return r_p.r[0][block][i] * (dp - delta.of(block, i));
      });
      if (is_masked) {  // dp of a hidden key may be infinite
        device::keep_seeing_of_warp(r_ds, s_work.window, first_key + warp_row, first_query, 0.0f);
      }
      const auto r_ds_elements = device::to_operand<Element>(r_ds);
      turns.end();
      at.wait_empty(s.ds_ring);
      device::store_transposed(r_ds_elements, s.ds[at.stage()], warp_row);
      ptx::fence_async_proxy();
      __syncwarp();
      if (ptx::lane_index() == 0) {
        at.fill(s.ds_ring);
      }

      ptx::wgmma_fence();
      device::issue_ab(r_dv, r_p_elements, s_dout, true);
      ptx::wgmma_commit();
      Dq r_dq;
      issue_dq(r_dq);  // at the first tile of whatever lies there or is being written: not taken
      ptx::wgmma_fence();
      device::issue_ab(r_dk, r_ds_elements, s_q, true);
      ptx::wgmma_commit();

      ptx::wgmma_wait<2>();
      ptx::wgmma_pin(r_dv.r[0]);
      at.release(s.dout_ring);
      // Ahead of the additions, for they hold up what waits for anything after them.
      if (!tiles.done()) {
        at.wait_next(s.q_ring);
        at.wait_next(s.dout_ring);
      }
      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(r_dq.r[0]);
      if (late.head >= 0) {
        finish_dq(r_dq);
      }
      late = tile;
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(r_dk.r[0]);
      at.release(s.q_ring);
      at.advance();
      finish_store();
    }

    finish_store();
    const ptx::BoxOrigin origin = {0, s_work.keys.begin + first_key + warpgroup_row,
                                   s_work.tile.head, s_work.batch_of_keys(params)};
    const auto rows_of = [&](const TensorView& view, int cols) {
      return device::global_tile<Element>(view, s_work.keys, s_work.tile.batch,
                                          first_key + warp_row, s_work.tile.head, cols);
    };
    // Nobody else reads a warpgroup's rows of the values; those of the keys dq wants.
    ptx::barrier_sync<device::kWarpgroupThreads>(warpgroup_barrier);
    store_through(device::to_operand<Element>(r_dv), s_v, warpgroup_row, maps.dv, origin,
                  rows_of(params.dv, params.shape.head_dim_v), warpgroup_barrier);
    if (late.head >= 0) {
      Dq r_dq;
      issue_dq(r_dq);
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(r_dq.r[0]);
      finish_dq(r_dq);
    }
    r_dk.scale(softmax_scale);
    ptx::barrier_sync<kMathThreads>(kMathBarrier);  // both have read all keys
    store_through(device::to_operand<Element>(r_dk), s_k, warpgroup_row, maps.dk, origin,
                  rows_of(params.dk, params.shape.head_dim), warpgroup_barrier);
    is_leaving = true;
    keys_left = keys_at;
    keys_at.advance();
    __syncwarp();  // all lanes have read s_work
  }
  if (thread == 0) {
    ptx::tma_wait();
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    flash_bwd_sm90(const __grid_constant__ BwdParams params,
                   const __grid_constant__ BwdTensorMaps maps, const Schedule schedule) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  auto& s = device::shared_memory<typename Traits::SharedMemory>();
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.dout, &maps.dk, &maps.dv}) {
      ptx::prefetch_tensor_map(map);
    }
    const int helpers = params.workspace.turns != nullptr ? 3 : 1;  // load queries, keep turns
    s.work_ring.init(Traits::kMathWarps + helpers, Traits::kMathWarpgroups);
    s.turn_ring.init(1);
    s.added_ring.init(1, Traits::kMathWarps);
    s.may_take.init(1);
    s.keys_ring.init(Traits::kMathWarps);
    s.q_ring.init(Traits::kMathWarps);
    s.dout_ring.init(Traits::kMathWarps);
    s.ds_ring.init(Traits::kMathWarps, Traits::kMathWarps);
    for (auto& s_landing : s.landings) {
      s_landing.init(1);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::wait_for_previous_kernel();
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / device::kWarpgroupThreads);
  if (warpgroup == 0) {
    ptx::shrink_registers<Traits::kProducerRegisters>();
    if (ptx::warp_index() == 0) {
      load_keys<Traits>(params, maps, schedule, s);
    } else if (ptx::warp_index() == 1) {
      load_queries<Traits>(params, maps, s);
    } else if (params.workspace.turns != nullptr) {
      keep_turns<Traits>(params, s, ptx::warp_index() == 2);
    }
  } else {
    ptx::grow_registers<Traits::kMathRegisters>();
    differentiate<Traits>(params, maps, s, warpgroup - 1);
  }
#else
  __trap();  // rather than leave gradients out as they were
#endif
}

}  // namespace fa::sm90
