// SPDX-License-Identifier: BSD-3-Clause
// Forward: out = softmax(scale * q k^T + mask) v and its log-sum-exp, one tile of queries of one
// head per block. A warp owns rows of queries: scores and out are its accumulators, and p goes from
// accumulators to an A operand without leaving the lane.
//
// k and v have two shared tiles each: k(j + 1) and v(j + 1) are copied under all of tile j. One
// barrier per tile of keys orders this: k(j) and v(j) have arrived, and every warp is done with tile
// j - 1.
#pragma once

#include <cfloat>

#include "common/params.h"
#include "common/scheduler.h"
#include "device/convert.cuh"
#include "device/epilogue.cuh"
#include "device/mask.cuh"
#include "device/softmax.cuh"
#include "device/warp_mma.cuh"
#include "sm80/traits.h"

namespace fa::sm80 {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    flash_fwd_sm80(const __grid_constant__ FwdParams params, const TileScheduler scheduler) {
  using Element = typename Traits::Element;
  constexpr int kTileM = Traits::kTileM;
  constexpr int kTileN = Traits::kTileN;
  constexpr int kThreads = Traits::kThreads;
  using Scores = typename Traits::Scores;
  using Out = typename Traits::Out;

  auto& s = device::shared_memory<typename Traits::SharedMemory>();
  const Shape& shape = params.shape;
  const int warp_row = ptx::warp_index() % Traits::kRowWarps * Traits::kWarpRows;
  const int warp_col = ptx::warp_index() / Traits::kRowWarps * Traits::kSlice;

  // exp2 wants a positive scale: a negative one is moved into q, and a tiny one stands for zero,
  // which would turn a masked -inf into NaN.
  const float softmax_scale = static_cast<float>(params.softmax_scale);
  const float positive_scale = fmaxf(fabsf(softmax_scale), FLT_MIN);

  const WorkTile tile = scheduler.last_first(scheduler.first + blockIdx.x);
  const Sequence sequence_q = params.queries.at(tile.batch, shape.seqlen_q);
  const Sequence sequence_k = params.keys.at(tile.batch, shape.seqlen_k);
  const WindowMask window = params.window.over(sequence_q.length, sequence_k.length);
  const int first_query = tile.tile * kTileM;
  if (first_query >= sequence_q.length) {
    return;
  }
  const Range queries = {first_query, min(first_query + kTileM, sequence_q.length)};
  const Range keys = window.keys_seen_by_any(queries);
  // Near the diagonal a warp may see less than its block.
  const int warp_query = first_query + warp_row;
  const Range warp_keys = window.keys_seen_by_any({warp_query, warp_query + Out::kRows});
  const Range unmasked_keys = window.keys_seen_by_all({warp_query, warp_query + Out::kRows});

  const auto query_rows = [&](const TensorView& view) {
    return device::global_tile<Element>(view, sequence_q, tile.batch, first_query, tile.head,
                                        shape.head_dim);
  };
  const auto load_keys = [&](const TensorView& view, int first_key, auto& s_tile) {
    s_tile.template load_async<kThreads>(
        device::global_tile<Element>(view, sequence_k, tile.batch, first_key,
                                     tile.head / shape.group_size(), shape.head_dim));
  };

  // Key tiles start at multiples of kTileN, so that a query's result depends on its own window
  // and not on that of its neighbours.
  const int keys_begin = keys.begin / kTileN * kTileN;
  s.q.template load_async<kThreads>(query_rows(params.q));
  if (!keys.empty()) {
    load_keys(params.k, keys_begin, s.k[0]);
    ptx::cp_async_commit();
    load_keys(params.v, keys_begin, s.v[0]);
    ptx::cp_async_commit();
  }
  if (softmax_scale < 0.0f) {
    ptx::cp_async_wait_all();
    s.q.template negate<kThreads>();
  }

  device::OnlineSoftmax<Out::kRowsPerThread> softmax(positive_scale);
  Out r_out;  // not yet normalized
  r_out.clear();

  int stage = 0;
  for (int first_key = keys_begin; first_key < keys.end; first_key += kTileN) {
    const int next_key = first_key + kTileN;
    // A block alone on its multiprocessor begins before its first v has arrived.
    const bool is_first = Traits::kBlocks == 1 && first_key == keys_begin;
    if (is_first) {
      ptx::cp_async_wait_group<1>();
    } else {
      ptx::cp_async_wait_group<0>();
    }
    __syncthreads();
    if (next_key < keys.end) {
      load_keys(params.k, next_key, s.k[stage ^ 1]);
      load_keys(params.v, next_key, s.v[stage ^ 1]);
    }
    ptx::cp_async_commit();
    if (is_first || (first_key < warp_keys.end && next_key > warp_keys.begin)) {
      Scores r_scores;  // p after the softmax
      r_scores.clear();
      device::accumulate_abt(r_scores, s.q, warp_row, s.k[stage], 0);
      if (!device::covers(unmasked_keys, {first_key, next_key})) {
        device::keep_visible(r_scores, window, warp_query, first_key, -INFINITY);
      }
      typename Out::RowValues rescale;
      if (softmax.update(r_scores, rescale)) {
        r_out.scale_rows(rescale);
      }
      const auto r_p = device::to_operand<Element>(r_scores);
      if (is_first) {
        ptx::cp_async_wait_group<1>();
        __syncthreads();
      }
      device::accumulate_ab(r_out, r_p, s.v[stage], warp_col);
    }
    stage ^= 1;
  }

  typename Out::RowValues lse;
  typename Out::RowValues normalizer;
  softmax.finalize(lse, normalizer);
  r_out.scale_rows(normalizer);
  if (warp_col == 0) {
    device::store_row_values<Out>(
        lse, params.softmax_lse.row<float>(tile.batch, tile.head) + sequence_q.begin,
        first_query + warp_row, sequence_q.length);
  }
  // Where these queries see no key, the copy of q is still under way here.
  ptx::cp_async_wait_all();
  __syncthreads();
  device::store_elements(r_out, s.q, warp_row, warp_col);
  __syncthreads();
  s.q.template store<kThreads>(query_rows(params.out));
}

}  // namespace fa::sm80
