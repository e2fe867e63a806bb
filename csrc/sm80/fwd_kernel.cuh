// SPDX-License-Identifier: BSD-3-Clause
// Forward: out = softmax(scale * q k^T + mask) v and its log-sum-exp, one tile of queries of one
// head per block. A warp owns rows of queries: scores and out are its accumulators, and p goes from
// accumulators to an A operand without leaving the lane.
//
// k and v have two shared tiles each: k(j + 1) and v(j + 1) are copied under all of tile j. One
// barrier per tile of keys orders this: k(j) and v(j) have arrived, and every warp is done with
// tile j - 1.
//
// Where head_dim is large, two warps own the same rows, with half of the columns of out each. Each
// computes the scores of half of the keys and gives p to the other through shared memory. The pair
// meets twice per tile of keys at a barrier of its own: to agree whether m is raised, which is rare
// and takes one meeting more, and when p is written. Of 16 keys both compute all scores, and share
// none.
#pragma once

#include <cfloat>

#include "common/params.h"
#include "common/scheduler.h"
#include "device/convert.cuh"
#include "device/epilogue.cuh"
#include "device/mask.cuh"
#include "device/softmax.cuh"
#include "device/warp_mma.cuh"
#include "device/work_order.cuh"
#include "ptx/barrier.cuh"
#include "sm80/traits.h"

namespace fa::sm80 {

// The two warps that own the same rows.
template <typename Traits>
class Pair {
 public:
  using RowValues = typename Traits::Out::RowValues;

  FA_DEVICE Pair(typename Traits::SharedMemory& s, int row_warp, int col_warp)
      : s_(s), row_warp_(row_warp), col_warp_(col_warp) {}

  // When both have come here, shared memory shows each what the other wrote before.
  FA_DEVICE void sync() const { ptx::barrier_sync<kThreads>(barrier()); }

  FA_DEVICE bool any(bool predicate) const {
    return ptx::barrier_any<kThreads>(barrier(), predicate);
  }

  // Each row's value becomes operation(of one warp, of the other): put, a barrier, and get.
  FA_DEVICE void put(const RowValues& values) const {
    if (device::leads_row()) {
      each_row([&](int i, int row) { s_.row_values[col_warp_][row] = values[i]; });
    }
  }
  template <typename Operation>
  FA_DEVICE void get(RowValues& values, Operation&& operation) const {
    each_row([&](int i, int row) {
      values[i] = operation(s_.row_values[0][row], s_.row_values[1][row]);
    });
  }

 private:
  static constexpr int kThreads = 2 * ptx::kWarpSize;
  FA_DEVICE int barrier() const { return 1 + row_warp_; }

  template <typename Visit>
  FA_DEVICE void each_row(Visit&& visit) const {
#pragma unroll
    for (int i = 0; i < Traits::Out::kRowsPerThread; ++i) {
      visit(i, row_warp_ * Traits::kWarpRows + Traits::Out::row(i));
    }
  }

  typename Traits::SharedMemory& s_;
  int row_warp_;
  int col_warp_;
};

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
  // Neighbours share rows: where the mask leaves rows at the top of a tile idle, those that work
  // are spread over all schedulers.
  const int warp = ptx::uniform(ptx::warp_index());
  const int row_warp = warp / Traits::kColWarps;
  const int col_warp = warp % Traits::kColWarps;
  const int warp_row = row_warp * Traits::kWarpRows;
  const int warp_col = col_warp * Traits::kSlice;
  const int warp_key = Traits::kSharesScores ? col_warp * Scores::kCols : 0;

  // exp2 wants a positive scale: a negative one is moved into q, and a tiny one stands for zero,
  // which would turn a masked -inf into NaN.
  const float softmax_scale = Traits::Rules::scale(static_cast<float>(params.softmax_scale));
  const float positive_scale = fmaxf(fabsf(softmax_scale), FLT_MIN);

  const WorkTile tile = device::in_sequence(scheduler.last_first(scheduler.first + blockIdx.x),
                                            params.queries, shape.batch, shape.seqlen_q, kTileM);
  const Sequence sequence_q = params.queries.at(tile.batch, shape.seqlen_q);
  const Sequence sequence_k = params.keys.at(tile.batch, shape.seqlen_k);
  const WindowMask window = params.window.over(sequence_q.length, sequence_k.length);
  const int first_query = tile.tile * kTileM;
  if (first_query >= sequence_q.length) {
    return;
  }
  const typename Traits::Rules rules(params, window, tile.batch);
  const Range queries = {first_query, min(first_query + kTileM, sequence_q.length)};
  const Range keys = rules.keys_seen_by_any(queries);
  // Near the diagonal a warp may see less than its block.
  const int warp_query = first_query + warp_row;
  const Range warp_keys = rules.keys_seen_by_any({warp_query, warp_query + Out::kRows});
  const Range unmasked_keys = window.keys_seen_by_all({warp_query, warp_query + Out::kRows});

  // Looked up again where it is used, rather than kept in registers through the loop.
  const auto query_rows = [&](const TensorView& view, int cols) {
    const int batch = static_cast<int>(ptx::opaque(tile.batch));
    return device::global_tile<Element>(view, params.queries.at(batch, shape.seqlen_q), batch,
                                        first_query, tile.head, cols);
  };
  const auto load_keys = [&](int first_key, int stage) {
    const auto key_rows = [&](const TensorView& view, int cols) {
      return device::global_tile<Element>(view, sequence_k, tile.batch, first_key,
                                          tile.head / shape.group_size(), cols);
    };
    s.k[stage].template load_async<kThreads>(key_rows(params.k, shape.head_dim));
    s.v[stage].template load_async<kThreads>(key_rows(params.v, shape.head_dim_v));
  };

  // Key tiles start at multiples of kTileN, so that a query's result depends on its own window
  // and not on that of its neighbours.
  const auto next_from = [&](int key) {
    return rules.next_key(tile.head, tile.tile, key, keys.end);
  };
  const int keys_begin = next_from(keys.begin / kTileN * kTileN);
  s.q.template load_async<kThreads>(query_rows(params.q, shape.head_dim));
  if (keys_begin < keys.end) {
    load_keys(keys_begin, 0);
  }
  if (softmax_scale < 0.0f) {
    ptx::cp_async_wait_all();
    s.q.template negate<kThreads>();
  }

  const Pair<Traits> pair(s, row_warp, col_warp);
  device::OnlineSoftmax<Out::kRowsPerThread> softmax(positive_scale);
  Out r_out;  // not yet normalized
  r_out.clear();

  int stage = 0;
  for (int first_key = keys_begin, next_key; first_key < keys.end; first_key = next_key) {
    const int end_key = first_key + kTileN;
    next_key = next_from(end_key);
    ptx::cp_async_wait_all();
    __syncthreads();
    if (next_key < keys.end) {
      load_keys(next_key, stage ^ 1);
    }
    if (first_key < warp_keys.end && end_key > warp_keys.begin) {
      Scores r_scores;  // p after the softmax
      r_scores.clear();
      device::accumulate_abt(r_scores, s.q, warp_row, s.k[stage], warp_key);
      rules.finish_scores(r_scores, tile.head, warp_query, first_key + warp_key);
      if (rules.is_masked({tile.head, tile.tile}, first_key / kTileN,
                          device::covers(unmasked_keys, {first_key, end_key}))) {
        typename Traits::Rules::template Seen<Scores> seen;
        rules.find_seen(seen, tile.head, warp_query, first_key + warp_key);
        rules.keep_seen(r_scores, seen, warp_query, first_key + warp_key, -INFINITY);
      }
      typename Out::RowValues largest;
      typename Out::RowValues rescale;
      softmax.largest(r_scores, largest);
      bool raised = true;
      if constexpr (Traits::kSharesScores) {
        raised = pair.any(softmax.raises(largest));
        if (raised) {
          pair.put(largest);
          pair.sync();
          pair.get(largest, [](float a, float b) { return fmaxf(a, b); });
        }
      }
      raised = raised && softmax.raise(largest, rescale);
      softmax.exponentiate(r_scores);
      rules.drop(r_scores, tile.head, warp_query, first_key + warp_key);
      if (__any_sync(~0u, raised)) {
        r_out.scale_rows(rescale);
      }
      if constexpr (Traits::kSharesScores) {
        device::store_elements(r_scores, s.p, warp_row, warp_key);
        pair.sync();
        device::accumulate_ab(r_out, s.p, warp_row, s.v[stage], warp_col);
      } else {
        device::accumulate_ab(r_out, device::to_operand<Element>(r_scores), s.v[stage], warp_col);
      }
    }
    stage ^= 1;
  }

  typename Out::RowValues sums;
  typename Out::RowValues lse;
  typename Out::RowValues normalizer;
  softmax.sums(sums);
  if constexpr (Traits::kSharesScores) {
    pair.put(sums);
  }
  // Where these queries see no key, the copy of q is still under way here.
  ptx::cp_async_wait_all();
  __syncthreads();
  if constexpr (Traits::kSharesScores) {
    pair.get(sums, [](float a, float b) { return a + b; });
  }
  rules.finalize(softmax, tile.head, sums, lse, normalizer);
  r_out.scale_rows(normalizer);
  if (col_warp == 0) {
    device::store_row_values<Out>(
        lse, params.softmax_lse.row<float>(tile.batch, tile.head) + sequence_q.begin,
        first_query + warp_row, sequence_q.length);
  }
  device::store_elements(r_out, s.q, warp_row, warp_col);
  __syncthreads();
  s.q.template store<kThreads>(query_rows(params.out, shape.head_dim_v));
}

}  // namespace fa::sm80
