// SPDX-License-Identifier: BSD-3-Clause
// Forward on Hopper under the rules of common/score_rules.h. As fwd_kernel.cuh, with these
// differences:
//   The warp that loads keys and values walks the tiles of keys in which some query of the block
//   may see a key (visible_tiles.cuh), and tells of each with its keys. Both warpgroups that
//   compute meet all of them.
//   Whatever hides pairs of a mixed tile, a warp for each warpgroup finds it out and leaves a bit
//   for each pair in shared memory (seen_pairs.cuh). It has what it found of the next mixed tile in
//   registers when those who compute are done with one.
//   What dropout keeps those who compute find out under their products (kept_pairs.cuh).
//   A bias of the inputs' dtype with consecutive keys comes by TMA, and has a stage of its own for
//   each warpgroup, which is free again as soon as it has been added. Any other bias is read from
//   global memory by those who compute.
//   out leaves through the queries' place.
#pragma once

#include <cfloat>

#include "common/params.h"
#include "device/convert.cuh"
#include "device/epilogue.cuh"
#include "device/speculative_softmax.cuh"
#include "ptx/barrier.cuh"
#include "sm90/fwd_general_load.cuh"
#include "sm90/kept_pairs.cuh"
#include "sm90/score_bias.cuh"
#include "sm90/score_terms.cuh"
#include "sm90/shared_rows.cuh"
#include "sm90/store.cuh"
#include "sm90/turns.cuh"

namespace fa::sm90 {

// A math warpgroup.
template <typename Traits>
FA_DEVICE void attend_to_visible(const FwdParams& params, const GeneralFwdTensorMaps& maps,
                                 typename Traits::SharedMemory& s, int warpgroup) {
  using Element = typename Traits::Element;
  using Out = typename Traits::Out;
  using Scores = typename Traits::Scores;
  constexpr int kTileN = Traits::kTileN;

  const int thread = static_cast<int>(threadIdx.x) % device::kWarpgroupThreads;
  const int warpgroup_barrier = 1 + warpgroup;
  constexpr int kFirstTurn = 1 + Traits::kMathWarpgroups;  // the barriers after those
  const int warpgroup_row = warpgroup * device::kWarpgroupRows;
  const int row_of_warp = ptx::uniform(thread / ptx::kWarpSize) * device::kBlockRows;
  const ScoreRules& rules = params.rules;

  // exp2 wants a positive scale. Where it is not, or more becomes of a score, the scores themselves
  // are scaled.
  const float softmax_scale = static_cast<float>(params.softmax_scale);
  const bool has_bias = rules.bias.data != nullptr;
  const ScoreTerms& terms = rules.terms;
  const bool caps = Traits::kHasSoftcap && terms.softcap != 0;
  const bool drops = terms.dropout.any();
  const bool has_alibi = terms.alibi.data != nullptr;
  const bool scales_scores = has_bias || caps || has_alibi || softmax_scale < FLT_MIN;
  // As in the plain kernel.
  const bool tail_is_foreign = params.keys.cu_seqlens != nullptr || params.keys.seqused != nullptr;

  const Turns<Traits::kMathWarpgroups, kFirstTurn> turns(warpgroup);
  auto& s_q_ring = s.q_ring[warpgroup];
  device::RingPosition<kWorkStages> work_at;
  device::RingPosition<Traits::kQStages> q_at;
  device::RingPosition<Traits::kKvStages> k_at;
  device::RingPosition<Traits::kKvStages> v_at;
  device::RingPosition<1> bias_at;
  device::RingPosition<1> seen_at;
  bool is_leaving = false;  // out, from the shared memory of its queries
  const auto finish_store = [&] {
    if (is_leaving) {
      if (thread == 0) {
        ptx::tma_wait_read();
      }
      if (thread < ptx::kWarpSize) {
        q_at.release_previous(s_q_ring);
      }
    }
    is_leaving = false;
  };
  using Seen = SeenPairs<kTileN>;
  const auto read_key_tile = [&] { return KeyTile{ptx::uniform(s.key_tiles[k_at.stage()].bits)}; };
  const auto release_key_tile = [&] {
    __syncwarp();
    k_at.release(s.k_ring);
    k_at.advance();
  };
  // While products are on their way, where there are registers.
  constexpr bool kLoadsAhead = Traits::kHeadDim <= 128;
  const auto load_seen = [&](typename Seen::OfThread& r_seen, const KeyTile& key_tile,
                             bool is_ahead) {
    if (is_ahead == kLoadsAhead && key_tile.is_mixed()) {
      seen_at.wait(s.seen_ring[warpgroup]);
      // Among the products' registers nothing of the address is kept.
      const auto row = static_cast<int>(ptx::opaque(row_of_warp));
      s.seen[warpgroup].load(r_seen, row);
    }
  };

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
    const int first_query = ptx::uniform(s_work.first_query);
    const int warp_query = first_query + warpgroup_row + row_of_warp;
    const auto store_lse = [&](const typename Out::RowValues& lse) {
      device::store_row_values<Out>(lse, s_work.lse, warp_query, s_work.queries.length);
    };
    const auto out_rows = [&] {
      return device::global_tile<Element>(params.out, s_work.queries, s_work.tile.batch, warp_query,
                                          s_work.tile.head, params.shape.head_dim_v);
    };
    const auto find_kept = [&](typename Traits::Kept& r_kept, const KeyTile& key_tile) {
      if (drops) {
        r_kept.find(DropoutOfHead(terms.dropout, s_work.tile.batch, s_work.tile.head,
                                  params.shape.num_heads),
                    warp_query, key_tile.tile() * kTileN);
      }
    };
    // Turns the products of a tile into scores.
    const auto apply_rules = [&](Scores& r_scores, const KeyTile& key_tile,
                                 typename Seen::OfThread& r_seen) {
      float scale = softmax_scale;  // what is left to do
      if (caps) {
        device::cap_scores(r_scores, softmax_scale, static_cast<float>(terms.softcap),
                           [](float, int, int, int) {});
        scale = 1.0f;
      }
      if (has_alibi) {
        const WindowMask& window = s_work.window;
        add_alibi<false>(r_scores, scale,
                         terms.alibi.at<const float>(s_work.tile.batch, s_work.tile.head),
                         warp_query + window.offset() - key_tile.tile() * kTileN);
        scale = 1.0f;
      }
      if (maps.loads_bias) {
        bias_at.wait(s.bias_ring[warpgroup]);
        add_bias(r_scores, scale, s.bias[warpgroup], row_of_warp);
        ptx::fence_async_proxy();  // TMA, which writes there next, overtakes loads under way
        __syncwarp();
        bias_at.release(s.bias_ring[warpgroup]);
        bias_at.advance();
      } else if (has_bias) {
        add_bias(r_scores, scale, Traits::SharedMemory::floats_in(s.bias[warpgroup], row_of_warp),
                 {rules, s_work.tile.batch, s_work.tile.head, warp_query, s_work.queries.length,
                  key_tile.tile() * kTileN, s_work.keys.length});
      } else if (scales_scores && scale != 1.0f) {
        r_scores.scale(scale);
      }
      load_seen(r_seen, key_tile, false);
      if (key_tile.is_mixed()) {
        Seen::keep_seen(r_scores, r_seen);
      }
    };
    const auto drop_some = [&](auto& r_some, const typename Traits::Kept& r_kept) {
      if (drops) {
        r_kept.drop(r_some);
      }
    };
    const float* sink =
        terms.sinks.data == nullptr ? nullptr : &terms.sinks.at<const float>(0, s_work.tile.head);
    // When the softmax has used it, so that what comes next overtakes no load.
    const auto release_seen = [&](const KeyTile& key_tile) {
      if (key_tile.is_mixed()) {
        __syncwarp();
        seen_at.release(s.seen_ring[warpgroup]);
        seen_at.advance();
      }
    };
    device::SpeculativeSoftmax<Out::kRowsPerThread> softmax(scales_scores ? 1.0f : softmax_scale);
    typename Out::RowValues lse;
    typename Out::RowValues normalizer;

    finish_store();
    const bool has_queries = !s_work.key_tiles.empty();
    if (has_queries) {
      q_at.wait(s_q_ring);
    }
    k_at.wait(s.k_ring);
    KeyTile key_tile = read_key_tile();
    if (!key_tile.exists()) {
      release_key_tile();
      if (has_queries) {
        ptx::barrier_sync<device::kWarpgroupThreads>(warpgroup_barrier);  // all have waited for q
        if (thread < ptx::kWarpSize) {
          q_at.release(s_q_ring);
        }
        q_at.advance();
      }
      softmax.finalize(lse, normalizer, sink);
      store_lse(lse);
      store_units(out_rows(), [](int, int) { return uint4{0, 0, 0, 0}; });
      continue;
    }

    // The scores of the first tile.
    const auto& s_q = s.q[q_at.stage()];
    typename Traits::Probabilities r_p;
    {
      Scores r_scores;
      typename Seen::OfThread r_seen;
      typename Traits::Kept r_kept;
      ptx::wgmma_fence();
      device::issue_abt<Traits::kHeadDim>(r_scores, s_q, warpgroup_row, s.k[k_at.stage()]);
      ptx::wgmma_commit();
      load_seen(r_seen, key_tile, true);
      find_kept(r_kept, key_tile);
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(r_scores.r[0]);
      release_key_tile();
      apply_rules(r_scores, key_tile, r_seen);
      softmax.begin(r_scores, r_p);
      drop_some(r_p, r_kept);
      release_seen(key_tile);
    }
    const int rows_of_first = s_work.keys.length - key_tile.tile() * kTileN;
    if (rows_of_first < kTileN && tail_is_foreign) {
      v_at.wait(s.v_ring);
      clear_rows(s.v[v_at.stage()], rows_of_first, thread);
      show_rows(warpgroup_barrier);
    }
    Out r_out;  // not yet normalized
    r_out.clear();
    // Adds the product of one tile's p and turns the scores of the next into its p.
    while (!key_tile.is_last()) {
      Scores r_scores;
      typename Seen::OfThread r_seen;
      typename Traits::Kept r_kept;
      typename Out::RowValues rescale;
      const int q_row = ptx::uniform(static_cast<int>(ptx::opaque(warpgroup_row)));
      k_at.wait_both(s.k_ring, v_at, s.v_ring);
      turns.begin();
      ptx::wgmma_fence();
      device::issue_abt<Traits::kHeadDim>(r_scores, s_q, q_row, s.k[k_at.stage()]);
      ptx::wgmma_commit();
      device::issue_ab(r_out, r_p, s.v[v_at.stage()], true);
      ptx::wgmma_commit();
      turns.end();
      key_tile = read_key_tile();
      load_seen(r_seen, key_tile, true);
      find_kept(r_kept, key_tile);
      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(r_scores.r[0]);
      release_key_tile();
      apply_rules(r_scores, key_tile, r_seen);
      const auto finish_product = [&] {
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(r_out.r[0]);
        v_at.release(s.v_ring);
        v_at.advance();
      };
      bool raised;
      if constexpr (Traits::kOverlapsSoftmax) {
        typename Traits::Probabilities r_next;
        raised = softmax.next(r_scores, r_next, rescale);
        drop_some(r_next, r_kept);
        finish_product();
        r_p.copy(r_next);
      } else {
        finish_product();
        raised = softmax.next(r_scores, r_p, rescale);
        drop_some(r_p, r_kept);
      }
      if (raised) {
        r_out.scale_rows(rescale);
      }
      release_seen(key_tile);
    }
    v_at.wait(s.v_ring);
    ptx::wgmma_fence();
    device::issue_ab(r_out, r_p, s.v[v_at.stage()], true);
    ptx::wgmma_commit();
    softmax.finalize(lse, normalizer, sink);
    store_lse(lse);
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(r_out.r[0]);
    v_at.release(s.v_ring);
    v_at.advance();

    if (drops) {
      r_out.scale(static_cast<float>(terms.dropout.scale));
    }
    r_out.scale_rows(normalizer);
    const auto r_elements = device::to_operand<Element>(r_out);
    const ptx::BoxOrigin origin = {0, s_work.queries.begin + first_query + warpgroup_row,
                                   s_work.tile.head, s_work.batch_of_queries(params)};
    ptx::barrier_sync<device::kWarpgroupThreads>(warpgroup_barrier);  // all have read their q
    // Wide rows have no register to keep the address in.
    const int row = kLoadsAhead ? warpgroup_row : static_cast<int>(ptx::opaque(warpgroup_row));
    store_through(r_elements, s.q[q_at.stage()], row, maps.out, origin, out_rows(),
                  warpgroup_barrier);
    q_at.advance();
    is_leaving = true;
  }
  if (thread == 0) {
    ptx::tma_wait();
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    flash_fwd_general_sm90(const __grid_constant__ FwdParams params,
                           const __grid_constant__ GeneralFwdTensorMaps maps,
                           const Schedule schedule) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  auto& s = device::shared_memory<typename Traits::SharedMemory>();
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.out, &maps.bias}) {
      ptx::prefetch_tensor_map(map);
    }
    constexpr int kHelpers = 3;  // load keys, find out pairs
    s.work_ring.init(Traits::kMathWarps + kHelpers, Traits::kMathWarpgroups);
    s.may_take.init(1);
    s.k_ring.init(Traits::kMathWarps);
    s.v_ring.init(Traits::kMathWarps);
    for (int warpgroup = 0; warpgroup < Traits::kMathWarpgroups; ++warpgroup) {
      s.q_ring[warpgroup].init(1);
      s.bias_ring[warpgroup].init(Traits::kWarpgroupWarps);
      s.seen_ring[warpgroup].init(Traits::kWarpgroupWarps, ptx::kWarpSize);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / device::kWarpgroupThreads);
  if (warpgroup != 0) {
    ptx::grow_registers<Traits::kMathRegisters>();
    attend_to_visible<Traits>(params, maps, s, warpgroup - 1);
  } else {
    ptx::shrink_registers<Traits::kProducerRegisters>();
    if (ptx::warp_index() == 0) {
      load_general_queries<Traits>(params, maps, schedule, s);
    } else if (ptx::warp_index() == 1) {
      load_visible_tiles<Traits>(params, maps, s);
    } else {
      find_seen_pairs<Traits>(params, s, ptx::warp_index() - 2);
    }
  }
#else
  __trap();  // rather than leave out as it was
#endif
}

}  // namespace fa::sm90
