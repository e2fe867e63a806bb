// SPDX-License-Identifier: BSD-3-Clause
// Backward, after support/bwd_preprocess: with p = exp(scale * q k^T - lse), dp = dout v^T and
// ds = p * (dp - delta),
//   flash_bwd_dkdv_sm80:  dv = p^T dout,  dk = scale * ds^T q   (block: one tile of keys),
//   flash_bwd_dq_sm80:    dq = scale * ds k                     (block: one tile of queries).
//
// Each kernel computes p and ds in the orientation in which its own rows are the rows of the
// accumulators, 16 per warp: p^T and ds^T for dk and dv, ds for dq. They then are A operands
// without leaving the lane: no exchange through shared memory, no atomics, and one fixed order of
// summation, so the result is deterministic. The price is that scores and dp are computed twice.
// Barriers: one before the streamed tiles are overwritten, one after they have arrived.
#pragma once

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
    flash_bwd_dkdv_sm80(const __grid_constant__ BwdParams params, const TileScheduler scheduler) {
  using Element = typename Traits::Element;
  constexpr int kOwned = Traits::kOwned;        // keys of the block's tile
  constexpr int kStreamed = Traits::kStreamed;  // queries that pass by at a time
  constexpr int kThreads = Traits::kThreads;
  constexpr MaskMode kMask = Traits::kMask;

  auto& s = device::shared_memory<typename Traits::DkdvSharedMemory>();
  const Shape& shape = params.shape;
  const WindowMask& window = params.window;
  const float softmax_scale = static_cast<float>(params.softmax_scale);
  const float scale_log2 = softmax_scale * kLog2E;
  const int warp_row = ptx::warp_index() * device::kWarpRows;

  for (int64_t work = blockIdx.x; work < scheduler.count(); work += gridDim.x) {
    const WorkTile tile = scheduler.at(work);  // tile.head is a head of keys and values
    const int first_key = tile.tile * kOwned;
    const Range keys = {first_key, min(first_key + kOwned, shape.seqlen_k)};
    const Range queries = device::queries_seeing_any<kMask>(window, keys);
    const Range unmasked_queries = device::queries_seeing_all<kMask>(window, keys);

    const auto key_rows = [&](const TensorView& view) {
      return device::global_tile<Element>(view, tile.batch, first_key, tile.head, shape.seqlen_k,
                                          shape.head_dim);
    };
    s.k.template load_async<kThreads>(key_rows(params.k));
    s.v.template load_async<kThreads>(key_rows(params.v));

    device::Accumulator<Traits::kHeadDim> r_dk;  // (16, head_dim), without softmax_scale
    device::Accumulator<Traits::kHeadDim> r_dv;  // (16, head_dim)
    r_dk.clear();
    r_dv.clear();

    const int first_head = tile.head * shape.group_size();
    for (int head = first_head; head < first_head + shape.group_size(); ++head) {
      const int64_t statistics = shape.row_statistics_offset(tile.batch, head);
      const float* g_lse = static_cast<const float*>(params.softmax_lse) + statistics;
      const float* g_delta = static_cast<const float*>(params.delta) + statistics;

      for (int first_query = queries.begin / kStreamed * kStreamed; first_query < queries.end;
           first_query += kStreamed) {
        const auto query_rows = [&](const TensorView& view) {
          return device::global_tile<Element>(view, tile.batch, first_query, head, shape.seqlen_q,
                                              shape.head_dim);
        };
        __syncthreads();
        s.q.template load_async<kThreads>(query_rows(params.q));
        s.dout.template load_async<kThreads>(query_rows(params.dout));
        // Queries past the end get the LSE of a row that sees no key: their p is 0.
        for (int i = threadIdx.x; i < kStreamed; i += kThreads) {
          const bool exists = first_query + i < shape.seqlen_q;
          s.lse_log2[i] = device::lse_to_log2(exists ? g_lse[first_query + i] : -INFINITY);
          s.delta[i] = exists ? g_delta[first_query + i] : 0.0f;
        }
        ptx::cp_async_wait_all();
        __syncthreads();

        device::Accumulator<kStreamed> r_p;  // p^T (16, streamed)
        r_p.clear();
        device::accumulate_abt(r_p, s.k, warp_row, s.q);
        r_p.transform([&](float score, int, int block, int i) {
          const int query = device::accumulator_col(block, i);
          return ptx::exp2_approx(fmaf(score, scale_log2, -s.lse_log2[query]));
        });
        // Keys past the end need no mask: they are rows of the accumulators that are not stored.
        if (!device::covers(unmasked_queries,
                            {first_query, min(first_query + kStreamed, shape.seqlen_q)})) {
          device::keep_visible(r_p, first_key + warp_row, first_query, 0.0f, [&](int key) {
            return device::queries_seeing_any<kMask>(window, {key, key + 1});
          });
        }
        device::accumulate_ab(r_dv, device::to_operand<Element>(r_p), s.dout);

        device::Accumulator<kStreamed> r_ds;  // dp^T, then ds^T (16, streamed)
        r_ds.clear();
        device::accumulate_abt(r_ds, s.v, warp_row, s.dout);
        r_ds.transform([&](float dp, int, int block, int i) {
          const int query = device::accumulator_col(block, i);
          return device::softmax_gradient(r_p.r[block][i], dp, s.delta[query]);
        });
        device::accumulate_ab(r_dk, device::to_operand<Element>(r_ds), s.q);
      }
    }

    // Where no query sees these keys, the copies of k and v are still under way here.
    ptx::cp_async_wait_all();
    __syncthreads();
    r_dk.scale(softmax_scale);
    device::store_rows(r_dk, s.k, warp_row, key_rows(params.dk));
    device::store_rows(r_dv, s.v, warp_row, key_rows(params.dv));
    __syncthreads();  // the next work item overwrites the shared tiles
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    flash_bwd_dq_sm80(const __grid_constant__ BwdParams params, const TileScheduler scheduler) {
  using Element = typename Traits::Element;
  constexpr int kOwned = Traits::kOwned;        // queries of the block's tile
  constexpr int kStreamed = Traits::kStreamed;  // keys that pass by at a time
  constexpr int kThreads = Traits::kThreads;
  constexpr MaskMode kMask = Traits::kMask;

  auto& s = device::shared_memory<typename Traits::DqSharedMemory>();
  const Shape& shape = params.shape;
  const WindowMask& window = params.window;
  const float softmax_scale = static_cast<float>(params.softmax_scale);
  const float scale_log2 = softmax_scale * kLog2E;
  const int warp_row = ptx::warp_index() * device::kWarpRows;

  for (int64_t work = blockIdx.x; work < scheduler.count(); work += gridDim.x) {
    const WorkTile tile = scheduler.at(work);
    const int head_kv = tile.head / shape.group_size();
    const int first_query = tile.tile * kOwned;
    const Range queries = {first_query, min(first_query + kOwned, shape.seqlen_q)};
    const Range keys = device::keys_seen_by_any<kMask>(window, queries);
    const Range unmasked_keys = device::keys_seen_by_all<kMask>(window, queries);

    const auto query_rows = [&](const TensorView& view) {
      return device::global_tile<Element>(view, tile.batch, first_query, tile.head, shape.seqlen_q,
                                          shape.head_dim);
    };
    s.q.template load_async<kThreads>(query_rows(params.q));
    s.dout.template load_async<kThreads>(query_rows(params.dout));

    const int64_t statistics = shape.row_statistics_offset(tile.batch, tile.head);
    float lse_log2[device::kRowsPerThread];
    float delta[device::kRowsPerThread];
    device::load_row_values(lse_log2, static_cast<const float*>(params.softmax_lse) + statistics,
                            first_query + warp_row, shape.seqlen_q, -INFINITY);
    device::load_row_values(delta, static_cast<const float*>(params.delta) + statistics,
                            first_query + warp_row, shape.seqlen_q, 0.0f);
#pragma unroll
    for (float& lse : lse_log2) {
      lse = device::lse_to_log2(lse);
    }

    device::Accumulator<Traits::kHeadDim> r_dq;  // (16, head_dim), without softmax_scale
    r_dq.clear();

    for (int first_key = keys.begin / kStreamed * kStreamed; first_key < keys.end;
         first_key += kStreamed) {
      const auto key_rows = [&](const TensorView& view) {
        return device::global_tile<Element>(view, tile.batch, first_key, head_kv, shape.seqlen_k,
                                            shape.head_dim);
      };
      __syncthreads();
      s.k.template load_async<kThreads>(key_rows(params.k));
      s.v.template load_async<kThreads>(key_rows(params.v));
      ptx::cp_async_wait_all();
      __syncthreads();

      device::Accumulator<kStreamed> r_p;  // (16, streamed)
      r_p.clear();
      device::accumulate_abt(r_p, s.q, warp_row, s.k);
      r_p.transform([&](float score, int row, int, int) {
        return ptx::exp2_approx(fmaf(score, scale_log2, -lse_log2[row]));
      });
      if (!device::covers(unmasked_keys, {first_key, first_key + kStreamed})) {
        device::keep_visible(r_p, first_query + warp_row, first_key, 0.0f, [&](int query) {
          return device::keys_seen_by_any<kMask>(window, {query, query + 1});
        });
      }

      device::Accumulator<kStreamed> r_ds;  // dp, then ds (16, streamed)
      r_ds.clear();
      device::accumulate_abt(r_ds, s.dout, warp_row, s.v);
      r_ds.transform([&](float dp, int row, int block, int i) {
        return device::softmax_gradient(r_p.r[block][i], dp, delta[row]);
      });
      device::accumulate_ab(r_dq, device::to_operand<Element>(r_ds), s.k);
    }

    // Where these queries see no key, the copies of q and dout are still under way here.
    ptx::cp_async_wait_all();
    __syncthreads();
    r_dq.scale(softmax_scale);
    device::store_rows(r_dq, s.q, warp_row, query_rows(params.dq));
    __syncthreads();  // the next work item overwrites the shared tiles
  }
}

}  // namespace fa::sm80
