// SPDX-License-Identifier: BSD-3-Clause
// Backward on Hopper under the rules of common/score_rules.h where head_dim is large: by the
// warpgroups of bwd_wide_kernel.cuh, of the tiles of bwd_general_kernel.cuh. But for the gradient
// of a bias. What differs from the plain wide kernel:
//   The warp that loads queries walks the tiles of queries that see some of the keys
//   (bwd_general_work.cuh), and tells whether an item has any, and of each with its queries. Those
//   who compute look at no map, and leave an item with the tile that is told to be its last.
//   Of a mixed tile each lane of warpgroup 1 finds out which of its pairs are seen
//   (seen_pairs_of_lane.cuh), under the products that give their scores.
//   A bias of the inputs' dtype with consecutive keys comes by TMA, with the queries, to where p
//   will be. Any other bias each lane reads from global memory, under the same products, and leaves
//   in the places of p and ds. So warpgroup 1 meets once more before it writes p.
//   Keys and values come whether any query sees them or not.
//
// The rings, with who fills them and for whom:
//   work      warp 0        all others
//   visible   warp 1        warpgroups 1 to 3: whether the work has any tile. Free with the work
//   k, v      warp 0        warpgroup 1, each free again after its own last product of an item
//   q         warp 1        warpgroups 1 and 3; with statistics, bits, bias and what is told
//   dout      warp 1        warpgroups 1 and 2
//   p         warpgroup 1   warpgroup 2
//   ds        warpgroup 1   warpgroup 3, and 1 itself, which meets for that
//   turn      warp 2        warpgroup 1, to add to dq, in a deterministic pass
//   added     warpgroup 1   warp 3, in a deterministic pass
// The last six have a stage for each tile of queries and advance together. A stage of q is filled
// when that of dout is free too, and with it that of p: there a bias comes, and warpgroup 2, which
// does not release q, reads what is told.
//
// Deterministic: as in the general kernel of narrower rows.
#pragma once

#include "ptx/barrier.cuh"
#include "sm90/bwd_dq.cuh"
#include "sm90/bwd_general_load.cuh"
#include "sm90/bwd_wide_general_traits.h"
#include "sm90/bwd_wide_gradient.cuh"
#include "sm90/bwd_wide_load.cuh"
#include "sm90/kept_pairs.cuh"
#include "sm90/score_bias.cuh"
#include "sm90/score_terms.cuh"
#include "sm90/seen_pairs_of_lane.cuh"

namespace fa::sm90 {

// Whether there are more tiles of queries for those who sum dv and dk, by what is told of each.
struct ToldTiles {
  const ToldTile (&s_told)[kBwdStages];
  bool is_done;

  FA_DEVICE bool done() const { return is_done; }
  FA_DEVICE void enter(int stage) {
    is_done = ToldTile{.bits = ptx::uniform(s_told[stage].bits)}.is_last();
  }
};

// Warpgroup 1.
template <typename Traits>
FA_DEVICE void differentiate_visible_scores(const BwdParams& params,
                                            const GeneralBwdTensorMaps& maps,
                                            typename Traits::SharedMemory& s) {
  using Element = typename Traits::Element;
  using Scores = typename Traits::Scores;
  using Seen = SeenPairsOfLane<Scores, false>;
  using BiasHalf = typename Traits::BiasHalf;
  constexpr int kTileM = Traits::kTileM;
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kBarrier = 1;
  constexpr int kBiasAtOnce = 4;

  const int thread = static_cast<int>(threadIdx.x) % device::kWarpgroupThreads;
  const int warp_row = ptx::uniform(thread / ptx::kWarpSize) * device::kBlockRows;
  const ScoreRules& rules = params.rules;
  const bool has_bias = rules.bias.data != nullptr;
  const float softmax_scale = static_cast<float>(params.softmax_scale);
  const bool has_alibi = rules.terms.alibi.data != nullptr;
  const auto softcap = static_cast<float>(rules.terms.softcap);
  const bool caps = Traits::kHasSoftcap && softcap != 0;
  const Dropout& dropout = rules.terms.dropout;
  const bool drops = dropout.any();
  const float scale_log2 =  // what is left to do
      has_bias || has_alibi || caps ? kLog2E : softmax_scale * kLog2E;
  const bool is_deterministic = params.workspace.turns != nullptr;

  device::RingPosition<kWorkStages> work_at;
  device::RingPosition<1> keys_at;
  device::RingPosition<kBwdStages> at;  // of what there is of each tile of queries
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
    keys_at.wait(s.k_ring);
    keys_at.wait(s.v_ring);
    work_at.wait(s.visible_ring);
    bool is_last = !s_work.has_visible_tiles;
    if (is_last) {
      keys_at.release(s.v_ring);
    } else {
      at.wait(s.q_ring);
    }

    typename Traits::LastDq r_last_dq;
    r_last_dq.clear();
    int late = -1;  // index of the tile before, of which a share is still to be added; if any
    const auto add_last_dq = [&] {
      add_dq<Traits>(dq_lane<Traits>(params.workspace.dq_sum(late), 1), 1, r_last_dq);
      if (is_deterministic) {
        __syncwarp();  // all lanes have added
        if (ptx::lane_index() == 0) {
          at.fill_previous(s.added_ring);
        }
      }
    };
    for (; !is_last; at.advance()) {
      const ToldTile& s_told = s.told[at.stage()];
      const ToldTile tile = {s_told.index, ptx::uniform(s_told.head), ptx::uniform(s_told.bits)};
      auto& s_q = s.q[at.stage()];
      auto& s_dout = s.dout[at.stage()];
      const auto& s_statistics = s.statistics[at.stage()];
      is_last = tile.is_last();

      ptx::wgmma_fence();
      Scores r_p;
      device::issue_abt<kHeadDim>(r_p, s_q, 0, s.k);
      ptx::wgmma_commit();
      at.wait(s.dout_ring);
      ptx::wgmma_fence();
      Scores r_ds;  // dp, then ds
      device::issue_abt<kHeadDim>(r_ds, s_dout, 0, s.v);
      ptx::wgmma_commit();
      // These too come before additions, behind which loads queue up.
      typename Scores::RowValues lse_log2;
      typename Scores::RowValues delta;
#pragma unroll
      for (int row = 0; row < Scores::kRowsPerThread; ++row) {
        lse_log2[row] = s_statistics.lse_log2[warp_row + Scores::row(row)];
        delta[row] = s_statistics.delta[warp_row + Scores::row(row)];
      }
      const ScoreOrigin origin = {s_work.tile.batch, tile.head, tile.tile() * kTileM + warp_row,
                                  s_work.first_key};
      Seen seen;
      const auto find_seen = [&]<SeenBy kBy>() {
        if (tile.is_mixed()) {
          const uint32_t* words =  // of the warp's first query
              params.pair_bits.words == nullptr ? nullptr
                                                : s.bits_of(at.stage()) + warp_row * Seen::kWords;
          seen.template find<kBy>(rules, s_work.prefix_window(), origin, words);
        }
      };
      find_seen.template operator()<SeenBy::kWindowAndWords>();
      if (late >= 0) {
        add_last_dq();
      }
      KeptPairs<Scores::kCols, false> kept;
      if (drops) {
        kept.find(DropoutOfHead(dropout, origin.batch, origin.head, params.shape.num_heads),
                  origin.first_query, origin.first_key);
      }
      // What is read from global memory queues up: there are no registers for it before.
      find_seen.template operator()<SeenBy::kData>();
      if (has_bias && !maps.loads_bias) {
        at.wait_empty(s.p_ring);
        at.wait_empty(s.ds_ring);
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
          const BiasPart<false> bias = {rules,
                                        origin.batch,
                                        origin.head,
                                        origin.first_query,
                                        s_work.queries.length,
                                        origin.first_key + half * BiasHalf::kCols,
                                        s_work.keys.length};
          bias.template load_of_lane<BiasHalf, kBiasAtOnce>(s.bias_of_lane(at.stage(), half));
        }
      }

      const auto finish_dp = [&] {  // which becomes dp - delta
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(r_ds.r[0]);
        if (drops) {
          kept.keep(r_ds, static_cast<float>(dropout.scale));
        }
        r_ds.transform([&](float dp, int row, int, int) { return dp - delta[row]; });
      };
      float scale = softmax_scale;
      if constexpr (Traits::kHasSoftcap) {  // whose derivative is not to be kept
        finish_dp();
        ptx::wgmma_pin(r_p.r[0]);
        if (caps) {
          cap_scores(r_p, r_ds, softmax_scale, softcap);
          scale = 1.0f;
        }
      } else {
        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(r_p.r[0]);
      }
      if (has_alibi) {
        add_alibi<false>(r_p, scale, rules.terms.alibi.at<const float>(origin.batch, origin.head),
                         origin.first_query + s_work.window.offset() - origin.first_key);
        scale = 1.0f;
      }
      if (maps.loads_bias) {
        add_bias(r_p, scale, s.bias_tile(at.stage()), warp_row);
      } else if (has_bias) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          add_bias_of_lane<BiasHalf::kColBlocks>(r_p, scale, s.bias_of_lane(at.stage(), half),
                                                 half * BiasHalf::kColBlocks);
        }
      }
      r_p.transform([&](float score, int row, int, int) {
        return ptx::exp2_approx(fmaf(score, scale_log2, -lse_log2[row]));
      });
      if (tile.is_mixed()) {
        seen.keep(r_p);
      }
      auto r_p_elements = device::to_operand<Element>(r_p);
      if (drops) {
        kept.drop(r_p_elements);
      }
      at.wait_empty(s.p_ring);
      if (has_bias) {
        ptx::barrier_sync<device::kWarpgroupThreads>(kBarrier);  // all have read it
      }
      device::store_transposed(r_p_elements, s.p[at.stage()], warp_row);
      fill_for_wgmma(s.p_ring, at);
      // delta may be on its way: warpgroup 3 releases this stage too, after ds, which needs it.
      at.release(s.q_ring);

      if constexpr (!Traits::kHasSoftcap) {
        finish_dp();
      }
      at.release(s.dout_ring);
      if (is_last) {
        keys_at.release(s.v_ring);
      }
      r_ds.transform(
          [&](float difference, int, int block, int i) { return r_p.r[0][block][i] * difference; });
      if (tile.is_mixed()) {  // dp of a hidden pair may be infinite
        seen.keep(r_ds);
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
      if (is_deterministic) {
        at.wait(s.turn_ring);
      }
      // Ahead of the additions, for they hold up what waits after them.
      if (!is_last) {
        at.wait_next(s.q_ring);
      }
      late = tile.index;
      add_dq<Traits>(dq_lane<Traits>(params.workspace.dq_sum(late), 0), 0, r_dq);
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(r_last_dq.r[0]);
    }
    keys_at.release(s.k_ring);
    keys_at.advance();
    if (late >= 0) {
      add_last_dq();
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    flash_bwd_wide_general_sm90(const __grid_constant__ BwdParams params,
                                const __grid_constant__ GeneralBwdTensorMaps maps,
                                const Schedule schedule) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  auto& s = device::shared_memory<typename Traits::SharedMemory>();
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.dout, &maps.bias}) {
      ptx::prefetch_tensor_map(map);
    }
    constexpr int kOne = Traits::kWarpgroupWarps;                   // the warps of one
    const int helpers = params.workspace.turns != nullptr ? 3 : 1;  // load queries, keep turns
    s.work_ring.init(Traits::kMathWarps + helpers, Traits::kMathWarpgroups);
    s.visible_ring.init(1);
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
    work_at.wait(s.visible_ring);
    return ToldTiles{s.told, !s.work[work_at.stage()].has_visible_tiles};
  };
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / device::kWarpgroupThreads);
  if (warpgroup == 1) {
    ptx::grow_registers<Traits::kScoreRegisters>();
    differentiate_visible_scores<Traits>(params, maps, s);
  } else if (warpgroup == 2) {
    ptx::grow_registers<Traits::kGradientRegisters>();
    sum_key_gradient<Traits>(params, s, s.p, s.p_ring, s.dout, s.dout_ring,
                             static_cast<float>(params.rules.terms.dropout.scale), params.dv,
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
      load_visible_queries<Traits>(params, maps, s);
    } else if (params.workspace.turns != nullptr) {
      keep_turns_of_visible<Traits>(params, s, ptx::warp_index() == 2);
    }
  }
#else
  __trap();  // rather than leave gradients out as they were
#endif
}

}  // namespace fa::sm90
