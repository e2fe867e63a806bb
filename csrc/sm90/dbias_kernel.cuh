// SPDX-License-Identifier: BSD-3-Clause
// The gradient of a bias on Hopper: ds, summed over what the bias was broadcast to. A block takes
// tiles of one matrix (queries, keys) of the bias, adds up all ds that share a tile in registers,
// and writes it once: the order of the sum is fixed. Along a dimension that is broadcast there is
// one tile for all, whose rows or columns are added up in the end.
//
// A tile of the gradient has 128 queries: one tile of the row of the kernel table, or two. Scores
// are transposed, (keys, queries), of 64 queries at a time. Those who compute are told of each of
// the row's tiles in which some pair is seen, and of whatever comes with it. The sums of a tile of
// the gradient leave when the next one begins, under its first products. In wide rows a single
// warpgroup computes.
//
// One warp loads, for those who compute, in rings of two stages each:
//   q      and what is told of the tile
//   dout   and statistics
//   keys   k and v, where they are not those of the tile before; free when the next ones are there
//          or, where there is room for one stage alone, when they are told of
//   bias   if TMA brings it, once for each of the row's tiles in a tile of the gradient; free when
//          the last one who shares it has added it or, if that was not known, when the next begins
#pragma once

#include "device/mask.cuh"
#include "ptx/barrier.cuh"
#include "sm90/column_values.cuh"
#include "sm90/dbias_load.cuh"
#include "sm90/dbias_store.cuh"
#include "sm90/kept_pairs.cuh"
#include "sm90/score_bias.cuh"
#include "sm90/score_terms.cuh"
#include "sm90/seen_pairs_of_lane.cuh"

namespace fa::sm90 {

// A math warpgroup.
template <typename Traits>
FA_DEVICE void differentiate_bias(const BwdParams& params, const GeneralBwdTensorMaps& maps,
                                  typename Traits::SharedMemory& s, int warpgroup) {
  using Scores = typename Traits::Scores;
  constexpr int kTileM = Traits::kTileM;
  constexpr int kTileN = Traits::kTileN;
  constexpr int kPartQueries = Traits::kPartQueries;
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kMathBarrier = 1;
  constexpr int kBiasAtOnce = 8;

  const int thread = static_cast<int>(threadIdx.x) % device::kWarpgroupThreads;
  const int warpgroup_row = warpgroup * device::kWarpgroupRows;
  const int warp_row = warpgroup_row + ptx::uniform(thread / ptx::kWarpSize) * device::kBlockRows;
  const ScoreRules& rules = params.rules;
  const auto softmax_scale = static_cast<float>(params.softmax_scale);
  const ScoreTerms& terms = rules.terms;
  const bool has_alibi = terms.alibi.data != nullptr;
  const bool caps = Traits::kHasSoftcap && terms.softcap != 0;
  const bool drops = terms.dropout.any();
  const auto bias_of_lane = [&] {
    const auto row = static_cast<int>(ptx::opaque(warp_row));  // nothing of it is kept
    return s.floats_of_warp(row) + ptx::lane_index();
  };

  DbiasSums<Scores, Traits::kParts> r_sums;
  r_sums.clear();
  DbiasPlace place;
  uint32_t held = 0;  // stages of the bias, as bits
  device::RingPosition<kBwdStages> at;
  device::RingPosition<Traits::kKeyStages> next_keys;
  device::RingPosition<Traits::kBiasStages> next_bias;
  const auto release_bias = [&](uint32_t stages) {
    ptx::fence_async_proxy();  // TMA overtakes loads
    __syncwarp();
#pragma unroll
    for (int stage = 0; stage < Traits::kBiasStages; ++stage) {
      if ((stages >> stage & 1) != 0 && ptx::lane_index() == 0) {
        ptx::mbarrier_arrive(s.bias_ring.empty[stage]);
      }
    }
    held &= ~stages;
  };
  const auto store = [&] {
    if (place.batch >= 0) {
      store_dbias<Traits>(params, r_sums, place, warp_row, s.floats_of_warp(0), kMathBarrier);
    }
  };

  for (;; at.advance()) {
    at.wait(s.q_ring);
    const ToldScores& s_told = s.told[at.stage()];
    const int bits = ptx::uniform(s_told.bits);
    const auto is_told = [&](int bit) { return (bits & bit) != 0; };
    if (is_told(ToldScores::kEnd)) {
      break;
    }
    if (is_told(ToldScores::kBringsKeys)) {
      const auto release_keys = [&] {
        if (!next_keys.is_first()) {
          next_keys.release_previous(s.keys_ring);
        }
      };
      if (Traits::kKeyStages == 1) {
        release_keys();
      }
      next_keys.wait(s.keys_ring);
      if (Traits::kKeyStages != 1) {
        release_keys();
      }
      next_keys.advance();
    }
    const int batch = ptx::uniform(s_told.batch);
    const int head = ptx::uniform(s_told.head);
    const int query_tile = ptx::uniform(s_told.query_tile);
    const int first_key = ptx::uniform(s_told.key_tile) * kTileN;
    const auto& s_keys = s.keys[next_keys.previous_stage()];
    const auto& s_statistics = s.statistics[at.stage()];
#pragma unroll 1
    for (int row = 0; row < kTileM; row += kPartQueries) {
      const bool is_first = row == 0;
      const bool is_last = row + kPartQueries == kTileM;
      const int first_query = query_tile * kTileM + row;
      // Else where rows lie would be kept in registers, one for each step of the products.
      const auto key_row = static_cast<int>(ptx::opaque(warpgroup_row));

      KeptPairs<Scores::kCols, true> kept;
      if (drops) {
        kept.find(DropoutOfHead(terms.dropout, batch, head, params.shape.num_heads), first_query,
                  first_key + warp_row);
      }
      Scores r_p;
      ptx::wgmma_fence();
      device::issue_abt<kHeadDim>(r_p, s_keys.k, key_row, s.q[at.stage()], row);
      ptx::wgmma_commit();
      at.wait(s.dout_ring);
      Scores r_ds;  // dp, then ds
      ptx::wgmma_fence();
      device::issue_abt<kHeadDim>(r_ds, s_keys.v, key_row, s.dout[at.stage()], row);
      ptx::wgmma_commit();

      if (is_first && is_told(ToldScores::kBegins)) {
        release_bias(held);
        store();
        r_sums.clear();
        place = {batch, head, query_tile / Traits::kTiles * Traits::kQueries, first_key};
      }
      SeenPairsOfLane<Scores, true, kTileM> seen;
      if (is_told(ToldScores::kMixed)) {
        const PairBits& pairs = params.pair_bits;
        const uint32_t* words =  // of the warp's first key
            pairs.words == nullptr ? nullptr
                                   : pairs.tile(batch, head, query_tile, first_key / kTileN) +
                                         warp_row * decltype(seen)::kWords;
        seen.find(rules, s_told.prefix_window(), {batch, head, first_query, first_key + warp_row},
                  words, row);
      }
      if (!maps.loads_bias) {
        const WindowMask& window = s_told.window;
        const BiasPart<true> bias = {rules,
                                     batch,
                                     head,
                                     first_query,
                                     window.seqlen_q(),
                                     first_key + warp_row,
                                     window.seqlen_k()};
        bias.load_of_lane<Scores, kBiasAtOnce>(bias_of_lane());
      } else if (is_first && is_told(ToldScores::kBringsBias)) {
        // In a uniform register.
        held =
            static_cast<uint32_t>(ptx::uniform(static_cast<int>(held | 1u << next_bias.stage())));
        next_bias.wait(s.bias_ring);
        next_bias.advance();
      }

      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(r_p.r[0]);
      float scale = softmax_scale;
      if (caps) {
        device::cap_scores(r_p, softmax_scale, static_cast<float>(terms.softcap),
                           [](float, int, int, int) {});
        scale = 1.0f;
      }
      if (has_alibi) {
        add_alibi<true>(r_p, scale, terms.alibi.at<const float>(batch, head),
                        first_query + s_told.window.offset() - first_key - warp_row);
        scale = 1.0f;
      }
      if (is_last) {
        __syncwarp();  // all lanes have read what is told of the tile
        at.release(s.q_ring);
      }
      if (maps.loads_bias) {
        const int stage = is_told(ToldScores::kSecondBiasStage) ? 1 : 0;
        add_transposed_bias(r_p, scale, s.bias[stage], row, warp_row);
        if (is_last && is_told(ToldScores::kFreesBias)) {
          release_bias(1u << stage);
        }
      } else {
        add_bias_of_lane<Scores::kColBlocks>(r_p, scale, bias_of_lane());
      }
      ColumnValues<Scores> lse_log2;
      lse_log2.load(s_statistics.lse_log2 + row);
      r_p.transform([&](float score, int, int block, int i) {
        return ptx::exp2_approx(fmaf(score, kLog2E, -lse_log2.of(block, i)));
      });
      if (is_told(ToldScores::kMixed)) {
        seen.keep(r_p);
      }

      ColumnValues<Scores> delta;
      delta.load(s_statistics.delta + row);
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(r_ds.r[0]);
      if (drops) {
        kept.keep(r_ds, static_cast<float>(terms.dropout.scale));
      }
      r_ds.transform([&](float dp, int, int block, int i) {
        return r_p.r[0][block][i] * (dp - delta.of(block, i));
      });
      if (is_told(ToldScores::kMixed)) {  // dp of a hidden pair may be infinite
        seen.keep(r_ds);
      }
      if (is_last) {
        ptx::fence_async_proxy();  // TMA overtakes loads
        __syncwarp();
        at.release(s.dout_ring);
      }
      r_sums.add(first_query / kPartQueries % Traits::kParts, r_ds);
    }
  }
  store();
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    flash_dbias_sm90(const __grid_constant__ BwdParams params,
                     const __grid_constant__ GeneralBwdTensorMaps maps, const DbiasTiles tiles,
                     const Schedule schedule) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  auto& s = device::shared_memory<typename Traits::SharedMemory>();
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.dout, &maps.bias}) {
      ptx::prefetch_tensor_map(map);
    }
    s.q_ring.init(Traits::kMathWarps);
    s.dout_ring.init(Traits::kMathWarps);
    s.keys_ring.init(Traits::kMathWarps);
    s.bias_ring.init(Traits::kMathWarps);
    s.landing.init(1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::wait_for_previous_kernel();
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / device::kWarpgroupThreads);
  if (warpgroup == 0) {
    if constexpr (Traits::kMathWarpgroups > 1) {
      ptx::shrink_registers<Traits::kProducerRegisters>();
    }
    if (ptx::warp_index() == 0) {
      load_scores_of_bias<Traits>(params, maps, tiles, schedule, s);
    }
  } else {
    if constexpr (Traits::kMathWarpgroups > 1) {
      ptx::grow_registers<Traits::kMathRegisters>();
    }
    differentiate_bias<Traits>(params, maps, s, warpgroup - 1);
  }
#else
  __trap();  // rather than leave gradients out as they were
#endif
}

}  // namespace fa::sm90
