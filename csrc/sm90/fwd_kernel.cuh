// SPDX-License-Identifier: BSD-3-Clause
// Forward on Hopper: out = softmax(scale * q k^T + mask) v and its log-sum-exp. As many blocks as
// multiprocessors take tiles of queries of one head until none is left. In a block,
//   warpgroup 0 loads: one of its warps takes the work, tells of it through a ring, and has TMA
//   copy the queries; another has TMA copy tiles of keys and values, through rings as well; the
//   others compute: each owns 64 rows of queries. Scores and out are its wgmma accumulators, and p
//   goes from accumulators to an A operand without leaving the lane.
//
// All blocks read tiles of keys from the first on, so that those of one head find them in L2. The
// math warpgroups take turns at the tensor cores, so that the softmax of one runs under the
// products of the others. In its turn a warpgroup issues two products,
//   s(j) = q k(j)^T, out += p(j - 1) v(j - 1),
// and turns s(j) into p(j) as soon as that is there; where registers are too few for a second p, as
// soon as both are.
#pragma once

#include <cfloat>
#include <type_traits>

#include "common/params.h"
#include "device/convert.cuh"
#include "device/epilogue.cuh"
#include "device/mask.cuh"
#include "device/speculative_softmax.cuh"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"
#include "sm90/fwd_load.cuh"
#include "sm90/fwd_values_for_out.cuh"
#include "sm90/shared_rows.cuh"
#include "sm90/store.cuh"
#include "sm90/turns.cuh"

namespace fa::sm90 {

// A math warpgroup.
template <typename Traits>
FA_DEVICE void attend(const FwdParams& params, const FwdTensorMaps& maps,
                      typename Traits::SharedMemory& s, int warpgroup) {
  using Element = typename Traits::Element;
  using Out = typename Traits::Out;
  constexpr int kTileN = Traits::kTileN;

  const int thread = static_cast<int>(threadIdx.x) % device::kWarpgroupThreads;
  const int warpgroup_barrier = 1 + warpgroup;
  constexpr int kFirstTurn = 1 + Traits::kMathWarpgroups;  // the barriers after those
  const int warpgroup_row = warpgroup * device::kWarpgroupRows;
  const int warp_row = warpgroup_row + ptx::uniform(thread / ptx::kWarpSize) * device::kBlockRows;

  // exp2 wants a positive scale: a negative one is moved into q, and a tiny one stands for zero,
  // which would turn a masked -inf into NaN.
  const float softmax_scale = static_cast<float>(params.softmax_scale);
  const float positive_scale = fmaxf(fabsf(softmax_scale), FLT_MIN);
  // Rows of v past the end of a sequence are then what others left there, NaN perhaps, which 0 must
  // not multiply.
  const bool tail_is_foreign = params.keys.cu_seqlens != nullptr || params.keys.seqused != nullptr;

  const Turns<Traits::kMathWarpgroups, kFirstTurn> turns(warpgroup);
  auto& s_q_ring = s.q_ring[warpgroup];
  device::RingPosition<kWorkStages> work_at;
  device::RingPosition<Traits::kQStages> q_at;
  device::RingPosition<Traits::kKvStages> k_at;
  device::RingPosition<Traits::kKvStages> v_at;
  const auto release_key_tile = [&] {
    k_at.release(s.k_ring);
    k_at.advance();
  };
  const auto release_value_tile = [&] {
    v_at.release(s.v_ring);
    v_at.advance();
  };
  const auto skip_key_tile = [&] {
    k_at.wait(s.k_ring);
    release_key_tile();
  };
  const auto skip_value_tile = [&] {
    v_at.wait(s.v_ring);
    release_value_tile();
  };
  // out leaves from the shared memory of its queries, or else of values, and that is free when TMA
  // has read it.
  bool is_leaving = false;
  device::RingPosition<Traits::kKvStages> v_held;
  const auto finish_store = [&] {
    if (is_leaving) {
      if (thread == 0) {
        ptx::tma_wait_read();
      }
      if constexpr (!Traits::kStoresThroughQueries) {
        v_held.release(s.v_ring);
      } else if (thread < ptx::kWarpSize) {
        q_at.release_previous(s_q_ring);
      }
    }
    is_leaving = false;
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
    const Range key_tiles = {ptx::uniform(s_work.key_tiles.begin),
                             ptx::uniform(s_work.key_tiles.end)};
    const KeyTiles& s_tiles = s_work.of_warpgroup[warpgroup];
    const Range seen = {ptx::uniform(s_tiles.seen.begin), ptx::uniform(s_tiles.seen.end)};
    const Range unmasked = {ptx::uniform(s_tiles.unmasked.begin),
                            ptx::uniform(s_tiles.unmasked.end)};
    const int first_query = ptx::uniform(s_work.first_query);
    const int warp_query = first_query + warp_row;
    const auto store_lse = [&](const typename Out::RowValues& lse) {
      device::store_row_values<Out>(lse, s_work.lse, warp_query, s_work.queries.length);
    };
    const auto out_rows = [&] {
      return device::global_tile<Element>(params.out, s_work.queries, s_work.tile.batch, warp_query,
                                          s_work.tile.head, params.shape.head_dim_v);
    };
    device::SpeculativeSoftmax<Out::kRowsPerThread> softmax(positive_scale);
    typename Out::RowValues lse;
    typename Out::RowValues normalizer;
    const ValuesForOut<Traits> values_for_out(warpgroup, warpgroup_barrier, key_tiles,
                                              s_work.of_warpgroup);
    const auto release_values_of = [&](int tile) {
      if (!Traits::kStoresThroughQueries && tile == values_for_out.held()) {
        v_held = v_at;
        v_at.advance();
      } else {
        release_value_tile();
      }
    };

    if (seen.empty()) {
      finish_store();
      for (int j = key_tiles.end - 1; j >= key_tiles.begin; --j) {
        skip_key_tile();
        skip_value_tile();
        if (j > key_tiles.begin) {
          turns.pass();
        }
      }
      if (!key_tiles.empty()) {
        q_at.wait(s_q_ring);
        if (!Traits::kStoresThroughQueries || thread < ptx::kWarpSize) {
          q_at.release(s_q_ring);
        }
        q_at.advance();
      }
      softmax.finalize(lse, normalizer);
      store_lse(lse);
      store_units(out_rows(), [](int, int) { return uint4{0, 0, 0, 0}; });
      continue;
    }

    for (int skipped = key_tiles.begin; skipped < seen.begin; ++skipped) {
      skip_key_tile();
    }
    const auto& s_q = s.q[q_at.stage()];
    q_at.wait(s_q_ring);
    if (softmax_scale < 0.0f) {
      negate_rows(s.q[q_at.stage()], warpgroup_row, thread);
      show_rows(warpgroup_barrier);
    }

    // The scores of the first tile.
    int j = seen.begin;
    typename Traits::Probabilities r_p;
    {
      typename Traits::Scores r_scores;
      k_at.wait(s.k_ring);
      ptx::wgmma_fence();
      device::issue_abt<Traits::kHeadDim>(r_scores, s_q, warpgroup_row, s.k[k_at.stage()]);
      ptx::wgmma_commit();
      finish_store();  // before values are waited for, which may have to come to the place of out
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(r_scores.r[0]);
      release_key_tile();
      if (j < unmasked.begin || j >= unmasked.end) {
        device::keep_visible_of_warp(r_scores, s_work.window, warp_query, j * kTileN, -INFINITY);
      }
      softmax.begin(r_scores, r_p);
    }
    for (int skipped = key_tiles.begin; skipped < seen.begin; ++skipped) {
      skip_value_tile();
      turns.pass();
    }
    Out r_out;  // not yet normalized
    r_out.clear();
    // Adds the product of one tile's p while the scores of the next become its r_next, which may be
    // of the first columns only.
    const auto step_between = [&](auto masked, const auto& r_previous, auto& r_next) {
      device::Accumulator<device::kBlockRows, std::decay_t<decltype(r_next)>::kCols> r_scores;
      typename Out::RowValues rescale;
      // Else ptxas keeps the descriptors of q through the loop, for which it has no registers.
      const int q_row = ptx::uniform(static_cast<int>(ptx::opaque(warpgroup_row)));
      k_at.wait_both(s.k_ring, v_at, s.v_ring);
      turns.begin();
      ptx::wgmma_fence();
      device::issue_abt<Traits::kHeadDim>(r_scores, s_q, q_row, s.k[k_at.stage()]);
      ptx::wgmma_commit();
      device::issue_ab(r_out, r_previous, s.v[v_at.stage()], true);
      ptx::wgmma_commit();
      turns.end();
      if constexpr (Traits::kOverlapsSoftmax) {
        ptx::wgmma_wait<1>();
      } else {
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(r_out.r[0]);
      }
      ptx::wgmma_pin(r_scores.r[0]);
      release_key_tile();
      if constexpr (decltype(masked)::value) {
        device::keep_visible_of_warp(r_scores, s_work.window, warp_query, j * kTileN, -INFINITY);
      }
      const bool raised = softmax.next(r_scores, r_next, rescale);
      if constexpr (Traits::kOverlapsSoftmax) {
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(r_out.r[0]);
      }
      release_values_of(j - 1);
      if (raised) {
        r_out.scale_rows(rescale);
      }
      ++j;
    };
    typename Traits::Probabilities r_other;
    const auto step = [&](auto masked) {
      if constexpr (Traits::kOverlapsSoftmax) {
        step_between(masked, r_p, r_other);
        r_p.copy(r_other);
      } else {
        step_between(masked, r_p, r_p);
      }
    };
    const bool is_trimmed = Traits::kTrims && seen.size() > 1 &&
                            ptx::uniform(s_tiles.last_cols) <= Traits::kTrimmedCols;
    const int end = is_trimmed ? seen.end - 1 : seen.end;
    ++j;
    while (j < end && j < unmasked.begin) {
      step(std::true_type{});
    }
    if constexpr (Traits::kAlternates) {
      while (j + 1 < end && j + 1 < unmasked.end) {
        step_between(std::false_type{}, r_p, r_other);
        step_between(std::false_type{}, r_other, r_p);
      }
    }
    while (j < end && j < unmasked.end) {
      step(std::false_type{});
    }
    while (j < end) {
      step(std::true_type{});
    }
    const auto finish = [&](const auto& r_last) {
      if constexpr (!Traits::kStoresThroughQueries) {
        q_at.release(s_q_ring);
        q_at.advance();
      }
      v_at.wait(s.v_ring);
      if constexpr (!Traits::kStoresThroughQueries) {
        values_for_out.begin_last_product();
      }
      const int rows_of_last = s_work.window.seqlen_k() - (seen.end - 1) * kTileN;
      if (rows_of_last < kTileN && tail_is_foreign) {
        clear_rows(s.v[v_at.stage()], rows_of_last, thread);
        show_rows(warpgroup_barrier);
      }
      ptx::wgmma_fence();
      device::issue_ab(r_out, r_last, s.v[v_at.stage()], true);
      ptx::wgmma_commit();
      softmax.finalize(lse, normalizer);
      store_lse(lse);
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(r_out.r[0]);
    };
    if constexpr (Traits::kTrims) {
      if (is_trimmed) {
        typename Traits::TrimmedProbabilities r_trimmed;
        step_between(std::true_type{}, r_p, r_trimmed);
        finish(r_trimmed);
      } else {
        finish(r_p);
      }
    } else {
      finish(r_p);
    }
    if constexpr (!Traits::kStoresThroughQueries) {
      values_for_out.end_last_product();
    }
    release_values_of(seen.end - 1);
    for (; j < key_tiles.end; ++j) {
      skip_key_tile();
      skip_value_tile();
      turns.pass();
    }

    r_out.scale_rows(normalizer);
    const auto r_elements = device::to_operand<Element>(r_out);
    const ptx::BoxOrigin origin = {0, s_work.queries.begin + first_query + warpgroup_row,
                                   s_work.tile.head, s_work.batch_of_queries(params)};
    if constexpr (Traits::kStoresThroughQueries) {
      ptx::barrier_sync<device::kWarpgroupThreads>(warpgroup_barrier);  // all have read their q
      store_through(r_elements, s.q[q_at.stage()], warpgroup_row, maps.out, origin, out_rows(),
                    warpgroup_barrier);
      q_at.advance();
    } else {
      values_for_out.wait();
      store_through(r_elements, s.out_in(s.v[v_held.stage()]), 0, maps.out, origin, out_rows(),
                    warpgroup_barrier);
      values_for_out.end_write(thread);
    }
    is_leaving = true;
  }
  if (thread == 0) {
    ptx::tma_wait();
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    flash_fwd_sm90(const __grid_constant__ FwdParams params,
                   const __grid_constant__ FwdTensorMaps maps, const Schedule schedule) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  auto& s = device::shared_memory<typename Traits::SharedMemory>();
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.out}) {
      ptx::prefetch_tensor_map(map);
    }
    s.work_ring.init(Traits::kMathWarps + 1, Traits::kMathWarpgroups);  // 1: to load keys
    for (auto& s_ring : s.q_ring) {
      s_ring.init(Traits::kStoresThroughQueries ? 1 : Traits::kMathWarps / Traits::kMathWarpgroups);
    }
    s.may_take.init(1);
    s.k_ring.init(Traits::kMathWarps);
    s.v_ring.init(Traits::kMathWarps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / device::kWarpgroupThreads);
  if (warpgroup == 0) {
    ptx::shrink_registers<Traits::kProducerRegisters>();
    if (ptx::warp_index() == 0) {
      load_queries<Traits>(params, maps, schedule, s);
    } else if (ptx::warp_index() == 1) {
      load_keys_and_values<Traits>(params, maps, s);
    }
  } else {
    ptx::grow_registers<Traits::kMathRegisters>();
    attend<Traits>(params, maps, s, warpgroup - 1);
  }
#else
  __trap();  // rather than leave out as it was
#endif
}

}  // namespace fa::sm90
