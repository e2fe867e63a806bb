// SPDX-License-Identifier: BSD-3-Clause
// Backward on Hopper under the rules of common/score_rules.h, but for the gradient of a bias. As
// bwd_kernel.cuh, with these differences:
//   The warp that loads queries walks the tiles of queries that see some of the keys
//   (bwd_general_work.cuh), and tells whether an item has any, and of each with its queries. Those
//   who compute look at no map, and leave an item with the tile that is told to be its last.
//   Of a mixed tile each lane finds out which of its pairs are seen (seen_pairs_of_lane.cuh), while
//   the products that give their scores run, and of any tile which dropout keeps
//   (kept_pairs.cuh). A bias of the inputs' dtype with consecutive keys comes by TMA, with the
//   queries. Any other bias each lane reads from global memory, under the same products, and leaves
//   in its place. There is one stage of keys: dk and dv leave from it before the next ones come.
//
// The rings, with who fills them and for whom:
//   work          warp 0   all others
//   keys          warp 0   those who compute, until dk and dv have left: which they wait for when
//                          they know of the next item, and before they wait for its keys
//   visible       warp 1   those who compute: whether the work has any tile. Free with the work
//   q             warp 1   those who compute; with statistics and bias
//   dout          warp 1   those who compute
//   ds            those who compute, for each other
//   turn          warp 2   those who compute, to add to dq
//   added         those who compute, for warp 3
// The last five have a stage for each tile of queries and advance together.
//
// Deterministic: as in the plain kernel, but that tiles of keys in which none of the queries sees
// any have no turn.
#pragma once

#include "device/mask.cuh"
#include "ptx/barrier.cuh"
#include "sm90/bwd_dq.cuh"
#include "sm90/bwd_general_load.cuh"
#include "sm90/column_values.cuh"
#include "sm90/kept_pairs.cuh"
#include "sm90/score_bias.cuh"
#include "sm90/score_terms.cuh"
#include "sm90/seen_pairs_of_lane.cuh"
#include "sm90/store.cuh"
#include "sm90/turns.cuh"

namespace fa::sm90 {

// A math warpgroup.
template <typename Traits>
FA_DEVICE void differentiate_visible(const BwdParams& params, const GeneralBwdTensorMaps& maps,
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
  // dp is waited for before scores are finished: its softcap's derivative is not to be kept.
  constexpr bool kEarly = Traits::kHasSoftcap;

  const int thread = static_cast<int>(threadIdx.x) % device::kWarpgroupThreads;
  constexpr int kFirstTurn = 2 + Traits::kMathWarpgroups;  // the barriers after those
  const int warpgroup_row = warpgroup * device::kWarpgroupRows;
  const int warp_row = warpgroup_row + ptx::uniform(thread / ptx::kWarpSize) * device::kBlockRows;
  const ScoreRules& rules = params.rules;
  const bool has_bias = rules.bias.data != nullptr;
  const float softmax_scale = static_cast<float>(params.softmax_scale);
  const ScoreTerms& terms = rules.terms;
  const bool has_alibi = terms.alibi.data != nullptr;
  const bool caps = kEarly && terms.softcap != 0;
  const bool drops = terms.dropout.any();
  const bool scales_scores = has_bias || has_alibi || caps;
  const float scale_log2 = scales_scores ? kLog2E : softmax_scale * kLog2E;  // what is left to do
  const bool is_deterministic = params.workspace.turns != nullptr;
  const Turns<Traits::kMathWarpgroups, kFirstTurn> turns(warpgroup);
  device::RingPosition<kWorkStages> work_at;  // and, with fewer stages, of keys
  device::RingPosition<kBwdStages> at;        // of what there is of each tile of queries
  const auto keys_at = [&] { return work_at.template in_ring_of<Traits::kKeyStages>(); };
  const auto is_first_thread = [] {
    return ptx::opaque(threadIdx.x) % device::kWarpgroupThreads == 0;
  };

  for (;; work_at.release(s.work_ring), work_at.advance()) {
    work_at.wait(s.work_ring);
    const auto& s_work = s.work[work_at.stage()];
    if (s_work.is_end()) {
      break;
    }
    if (!work_at.is_first()) {
      // dk and dv leave from the shared memory of their keys, which is free when TMA has read them.
      if (is_first_thread()) {
        ptx::tma_wait_read();
      }
      keys_at().release_previous(s.keys_ring);
    }
    const int first_key = ptx::uniform(s_work.first_key);
    auto& s_k = s.keys[keys_at().stage()].k;
    auto& s_v = s.keys[keys_at().stage()].v;
    keys_at().wait(s.keys_ring);

    KeyGradient r_dk;  // without softmax_scale
    KeyGradient r_dv;
    r_dk.clear();
    r_dv.clear();
    int late = -1;  // index of the tile before, of which dq is still to be added; if any
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
      add_dq<Traits>(dq_lane<Traits>(params.workspace.dq_sum(late), warpgroup), warpgroup, r_dq);
      if (is_deterministic) {
        __syncwarp();  // all lanes have added
        if (ptx::lane_index() == 0) {
          at.fill_previous(s.added_ring);
        }
      }
    };

    work_at.wait(s.visible_ring);
    bool is_last = !s_work.has_visible_tiles;
    if (!is_last) {
      at.wait(s.q_ring);
      at.wait(s.dout_ring);
    }
    while (!is_last) {
      const ToldTile& s_told = s.told[at.stage()];
      const ToldTile tile = {s_told.index, ptx::uniform(s_told.head), ptx::uniform(s_told.bits)};
      auto& s_q = s.q[at.stage()];
      auto& s_dout = s.dout[at.stage()];
      const auto& s_statistics = s.statistics[at.stage()];
      is_last = tile.is_last();
      // Else where the keys' rows lie would be kept in registers, one for each step of the
      // products.
      const auto key_row = static_cast<int>(ptx::opaque(warpgroup_row));

      const int first_query = tile.tile() * kTileM;
      typename Traits::Kept kept;
      const auto find_kept = [&] {
        if (drops) {
          kept.find(
              DropoutOfHead(terms.dropout, s_work.tile.batch, tile.head, params.shape.num_heads),
              first_query, first_key + warp_row);
        }
      };
      if (kEarly) {  // by measurement: its products are waited for together
        find_kept();
      }
      Scores r_p;
      ptx::wgmma_fence();
      device::issue_abt<kHeadDim>(r_p, s_k, key_row, s_q);
      ptx::wgmma_commit();
      if (!kEarly) {
        find_kept();
      }
      SeenPairsOfLane<Scores, true> seen;
      if (tile.is_mixed()) {
        const PairBits& bits = params.pair_bits;
        const uint32_t* words = nullptr;  // of the warp's first key
        if (bits.words != nullptr) {
          words = has_bias ? bits.tile(s_work.tile.batch, tile.head, tile.tile(), s_work.key_tile())
                           : s.bits_of(at.stage());
          words += warp_row * SeenPairsOfLane<Scores, true>::kWords;
        }
        seen.find(rules, s_work.prefix_window(),
                  {s_work.tile.batch, tile.head, first_query, first_key + warp_row}, words);
      }
      if (has_bias && !maps.loads_bias) {
        const BiasPart<true> bias = {rules,
                                     s_work.tile.batch,
                                     tile.head,
                                     first_query,
                                     s_work.queries.length,
                                     first_key + warp_row,
                                     s_work.keys.length};
        bias.load_of_lane<Scores>(s.bias_of_lane(warp_row));
      }
      Scores r_ds;  // dp, then ds
      ptx::wgmma_fence();
      device::issue_abt<kHeadDim>(r_ds, s_v, key_row, s_dout);
      ptx::wgmma_commit();

      ColumnValues<Scores> delta;
      const auto wait_for_dp = [&] {
        if (Traits::kLoadsStatisticsAhead) {
          delta.load(s_statistics.delta);
        }
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(r_ds.r[0]);
        if (!Traits::kLoadsStatisticsAhead) {
          delta.load(s_statistics.delta);
        }
      };
      const auto keep_scale = static_cast<float>(terms.dropout.scale);
      const auto finish_dp = [&] {  // which becomes dp - delta
        wait_for_dp();
        if (drops) {
          kept.keep(r_ds, keep_scale);
        }
        r_ds.transform([&](float dp, int, int block, int i) { return dp - delta.of(block, i); });
      };
      float scale = softmax_scale;
      if constexpr (kEarly) {
        finish_dp();
        ptx::wgmma_pin(r_p.r[0]);
        if (caps) {
          cap_scores(r_p, r_ds, softmax_scale, static_cast<float>(terms.softcap));
          scale = 1.0f;
        }
      } else {
        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(r_p.r[0]);
      }
      if (has_alibi) {
        add_alibi<true>(r_p, scale, terms.alibi.at<const float>(s_work.tile.batch, tile.head),
                        first_query + s_work.window.offset() - first_key - warp_row);
        scale = 1.0f;
      }
      if (maps.loads_bias) {
        add_transposed_bias(r_p, scale, s.bias[at.stage()], 0, warp_row);
      } else if (has_bias) {
        add_bias_of_lane<Scores::kColBlocks>(r_p, scale, s.bias_of_lane(warp_row));
      }
      ColumnValues<Scores> lse_log2;
      if (Traits::kLoadsStatisticsAhead) {
        lse_log2.load(s_statistics.lse_log2);
      }
      turns.begin();
      if (!Traits::kLoadsStatisticsAhead) {
        lse_log2.load(s_statistics.lse_log2);
      }
      r_p.transform([&](float score, int, int block, int i) {
        return ptx::exp2_approx(fmaf(score, scale_log2, -lse_log2.of(block, i)));
      });
      if (tile.is_mixed()) {
        seen.keep(r_p);
      }
      device::OperandA<Element, device::kBlockRows, kTileM> r_p_elements;
      if constexpr (kEarly || !Traits::kLoadsStatisticsAhead) {
        if (!kEarly) {
          finish_dp();
        }
        r_ds.transform([&](float difference, int row, int block, int i) {
          return r_p.r[0][block][i] * difference;
        });
        r_p_elements = device::to_operand<Element>(r_p);
        if (drops) {
          kept.drop(r_p_elements);
        }
      } else if (drops) {  // there are no registers for p and its elements
        wait_for_dp();
        r_ds.transform([&](float dp, int row, int block, int i) {
          float& p = r_p.r[0][block][i];
          const float of_row = p * delta.of(block, i);
          p = kept.keeps(row, block, i) ? p : 0.0f;
          return fmaf(p, dp * keep_scale, -of_row);
        });
        r_p_elements = device::to_operand<Element>(r_p);
      } else {
        r_p_elements = device::to_operand<Element>(r_p);
        wait_for_dp();
        r_ds.transform([&](float dp, int, int block, int i) {
          return r_p.r[0][block][i] * (dp - delta.of(block, i));
        });
      }
      if (tile.is_mixed()) {  // dp of a hidden pair may be infinite
        seen.keep(r_ds);
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
      if (!is_last) {
        at.wait_next(s.q_ring);
        at.wait_next(s.dout_ring);
      }
      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(r_dq.r[0]);
      if (late >= 0) {
        finish_dq(r_dq);
      }
      late = tile.index;
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(r_dk.r[0]);
      __syncwarp();  // all lanes have read what is told of the tile
      at.release(s.q_ring);
      at.advance();
    }

    const ptx::BoxOrigin origin = {0, s_work.keys.begin + first_key + warpgroup_row,
                                   s_work.tile.head, s_work.batch_of_keys(params)};
    const auto rows_of = [&](const TensorView& view, int cols) {
      return device::global_tile<Element>(view, s_work.keys, s_work.tile.batch,
                                          first_key + warp_row, s_work.tile.head, cols);
    };
    // Not kept in a register through the loop.
    const auto warpgroup_barrier = static_cast<int>(2 + ptx::opaque(warpgroup));
    if (drops) {
      r_dv.scale(static_cast<float>(terms.dropout.scale));
    }
    // Nobody else reads a warpgroup's rows of the values; those of the keys dq wants.
    ptx::barrier_sync<device::kWarpgroupThreads>(warpgroup_barrier);
    store_through(device::to_operand<Element>(r_dv), s_v, warpgroup_row, maps.dv, origin,
                  rows_of(params.dv, params.shape.head_dim_v), warpgroup_barrier);
    if (late >= 0) {
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
    __syncwarp();  // all lanes have read s_work
  }
  if (is_first_thread()) {
    ptx::tma_wait();
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    flash_bwd_general_sm90(const __grid_constant__ BwdParams params,
                           const __grid_constant__ GeneralBwdTensorMaps maps,
                           const Schedule schedule) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  auto& s = device::shared_memory<typename Traits::SharedMemory>();
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map :
         {&maps.q, &maps.k, &maps.v, &maps.dout, &maps.dk, &maps.dv, &maps.bias}) {
      ptx::prefetch_tensor_map(map);
    }
    const int helpers = params.workspace.turns != nullptr ? 3 : 1;  // load queries, keep turns
    s.work_ring.init(Traits::kMathWarps + helpers, Traits::kMathWarpgroups);
    s.visible_ring.init(1);
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
      load_visible_queries<Traits>(params, maps, s);
    } else if (params.workspace.turns != nullptr) {
      keep_turns_of_visible<Traits>(params, s, ptx::warp_index() == 2);
    }
  } else {
    ptx::grow_registers<Traits::kMathRegisters>();
    differentiate_visible<Traits>(params, maps, s, warpgroup - 1);
  }
#else
  __trap();  // rather than leave gradients out as they were
#endif
}

}  // namespace fa::sm90
