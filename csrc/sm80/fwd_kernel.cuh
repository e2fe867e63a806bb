// SPDX-License-Identifier: BSD-3-Clause
// Forward: out = softmax(scale * q k^T + mask) v and its log-sum-exp, one tile of queries of one
// head per block.
//
// Each warp owns 16 queries: its rows of q stay in registers as A operands, scores and out are
// accumulators, and p goes from accumulators to an A operand without leaving the lane.
// k and v have one shared tile each. The copy of v(j) runs under q k(j)^T, that of k(j + 1) under
// the softmax and p v(j). Two barriers per key tile order this:
//   top:    k(j) has arrived, and every warp is done with v(j - 1)
//   middle: v(j) has arrived, and every warp is done with k(j)
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
__global__ void __launch_bounds__(Traits::kThreads)
    flash_fwd_sm80(const __grid_constant__ FwdParams params, const TileScheduler scheduler) {
  using Element = typename Traits::Element;
  constexpr int kTileM = Traits::kTileM;
  constexpr int kTileN = Traits::kTileN;
  constexpr int kThreads = Traits::kThreads;
  constexpr MaskMode kMask = Traits::kMask;

  auto& s = device::shared_memory<typename Traits::SharedMemory>();
  const Shape& shape = params.shape;
  const WindowMask& window = params.window;
  const int warp_row = ptx::warp_index() * device::kWarpRows;

  // exp2 wants a positive scale: a negative one is moved into q, and a tiny one stands for zero,
  // which would turn a masked -inf into NaN.
  const float softmax_scale = static_cast<float>(params.softmax_scale);
  const float positive_scale = fmaxf(fabsf(softmax_scale), FLT_MIN);

  for (int64_t work = blockIdx.x; work < scheduler.count(); work += gridDim.x) {
    const WorkTile tile = scheduler.at(work);
    const int head_kv = tile.head / shape.group_size();
    const int first_query = tile.tile * kTileM;
    const Range queries = {first_query, min(first_query + kTileM, shape.seqlen_q)};
    const Range keys = device::keys_seen_by_any<kMask>(window, queries);
    const Range unmasked_keys = device::keys_seen_by_all<kMask>(window, queries);

    const auto query_rows = [&](const TensorView& view) {
      return device::global_tile<Element>(view, tile.batch, first_query, tile.head, shape.seqlen_q,
                                          shape.head_dim);
    };
    const auto key_rows = [&](const TensorView& view, int first_key) {
      return device::global_tile<Element>(view, tile.batch, first_key, head_kv, shape.seqlen_k,
                                          shape.head_dim);
    };

    // Key tiles start at multiples of kTileN, so that a query's result depends on its own window
    // and not on that of its neighbours.
    const int keys_begin = keys.begin / kTileN * kTileN;
    s.q.template load_async<kThreads>(query_rows(params.q));
    if (!keys.empty()) {
      s.k.template load_async<kThreads>(key_rows(params.k, keys_begin));
    }
    ptx::cp_async_wait_all();
    __syncthreads();

    auto r_q = device::load_rows(s.q, warp_row);  // (16, head_dim)
    if (softmax_scale < 0.0f) {
      r_q.negate();
    }
    device::OnlineSoftmax softmax(positive_scale);
    device::Accumulator<Traits::kHeadDim> r_out;  // (16, head_dim), not yet normalized
    r_out.clear();

    for (int first_key = keys_begin; first_key < keys.end; first_key += kTileN) {
      ptx::cp_async_wait_all();
      __syncthreads();
      s.v.template load_async<kThreads>(key_rows(params.v, first_key));

      device::Accumulator<kTileN> r_scores;  // (16, tile_n), p after the softmax
      r_scores.clear();
      device::accumulate_abt(r_scores, r_q, s.k);

      ptx::cp_async_wait_all();
      __syncthreads();
      if (first_key + kTileN < keys.end) {
        s.k.template load_async<kThreads>(key_rows(params.k, first_key + kTileN));
      }

      if (!device::covers(unmasked_keys, {first_key, first_key + kTileN})) {
        device::keep_visible(
            r_scores, first_query + warp_row, first_key, -INFINITY,
            [&](int query) { return device::keys_seen_by_any<kMask>(window, {query, query + 1}); });
      }
      float rescale[device::kRowsPerThread];
      softmax.update(r_scores, rescale);
      r_out.scale_rows(rescale);
      device::accumulate_ab(r_out, device::to_operand<Element>(r_scores), s.v);
    }

    float lse[device::kRowsPerThread];
    float normalizer[device::kRowsPerThread];
    softmax.finalize(lse, normalizer);
    r_out.scale_rows(normalizer);
    device::store_rows(r_out, s.q, warp_row, query_rows(params.out));
    device::store_row_values(lse,
                             static_cast<float*>(params.softmax_lse) +
                                 shape.row_statistics_offset(tile.batch, tile.head),
                             first_query + warp_row, shape.seqlen_q);

    __syncthreads();  // the next work item overwrites the shared tiles
  }
}

}  // namespace fa::sm80
