// SPDX-License-Identifier: BSD-3-Clause
// Backward, after support/bwd_preprocess. With p = exp(scale * q k^T - lse), dp = dout v^T and
// ds = p * (dp - delta),
//   dv = p^T dout,  dk = scale * ds^T q,  dq = scale * ds k.
// A block owns a tile of keys of one head of keys and values, and walks the tiles of queries that
// see them, of every head of queries that shares those keys: dk and dv are its accumulators, and
// its share of dq is added to sums in global memory, which flash_bwd_dq_sm80 then writes out.
//
// p and ds pass through shared memory, since each warp needs, for dv, dk and dq, what others
// computed. q, dout and their rows' statistics have two shared tiles each: tile i + 1 is copied
// under tile i. Two barriers per tile of queries:
//   top:    tile i has arrived, and every warp is done with tile i - 1
//   middle: p and ds are written
//
// Deterministic: blocks take their work in the order in which they begin, which is by tiles of
// keys, and add to a tile of dq in that order. A block so waits only for blocks that began before
// it.
#pragma once

#include "common/params.h"
#include "common/scheduler.h"
#include "device/convert.cuh"
#include "device/mask.cuh"
#include "device/warp_mma.cuh"
#include "device/work_order.cuh"
#include "sm80/bwd_scores.cuh"
#include "sm80/traits.h"

namespace fa::sm80 {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    flash_bwd_sm80(const __grid_constant__ BwdParams params, const TileScheduler scheduler) {
  using Element = typename Traits::Element;
  using ScoreGrid = typename Traits::ScoreGrid;
  using KeyGrid = typename Traits::KeyGrid;
  using QueryGrid = typename Traits::QueryGrid;
  constexpr int kTileM = Traits::kTileM;
  constexpr int kTileN = Traits::kTileN;
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kDqCols = Traits::kDqCols;
  constexpr int kThreads = Traits::kThreads;

  auto& s = device::shared_memory<typename Traits::SharedMemory>();
  const Shape& shape = params.shape;
  const BwdWorkspace& workspace = params.workspace;
  const float softmax_scale = static_cast<float>(params.softmax_scale);

  // of a head of keys and values
  const WorkTile tile = device::in_sequence(device::take_work(scheduler, workspace, s.ticket),
                                            params.keys, shape.batch, shape.seqlen_k, kTileN);
  const Sequence sequence_q = params.queries.at(tile.batch, shape.seqlen_q);
  const Sequence sequence_k = params.keys.at(tile.batch, shape.seqlen_k);
  const WindowMask window = params.window.over(sequence_q.length, sequence_k.length);
  const int first_key = tile.tile * kTileN;
  if (first_key >= sequence_k.length) {
    return;
  }
  const Range keys = {first_key, first_key + kTileN};
  const typename Traits::Rules rules(params, window, tile.batch);
  const Range queries = rules.queries_seeing_any(keys);
  const Range unmasked_queries = window.queries_seeing_all(keys);
  const int64_t first_tile = params.queries.first_tile(tile.batch, shape.seqlen_q, kTileM);

  // Looked up again where it is used, rather than kept in registers through the loop.
  const auto key_rows = [&](const TensorView& view, int cols) {
    const int batch = static_cast<int>(ptx::opaque(tile.batch));
    return device::global_tile<Element>(view, params.keys.at(batch, shape.seqlen_k), batch,
                                        first_key, tile.head, cols);
  };
  s.k.template load_async<kThreads>(key_rows(params.k, shape.head_dim));
  s.v.template load_async<kThreads>(key_rows(params.v, shape.head_dim_v));

  const auto load_queries = [&](const QueryTile& at, int stage) {
    const auto query_rows = [&](const TensorView& view, int cols) {
      return device::global_tile<Element>(view, sequence_q, tile.batch, at.tile * kTileM, at.head,
                                          cols);
    };
    s.queries[stage].q.template load_async<kThreads>(query_rows(params.q, shape.head_dim));
    s.queries[stage].dout.template load_async<kThreads>(query_rows(params.dout, shape.head_dim_v));
    load_statistics<kThreads>(s.statistics[stage],
                              workspace.lse_log2(workspace.index(at.head, first_tile + at.tile)));
  };

  typename KeyGrid::Sum r_dk;  // without softmax_scale
  typename KeyGrid::Sum r_dv;
  r_dk.clear();
  r_dv.clear();

  auto tiles =
      rules.query_tiles(queries, tile.tile, tile.head * shape.group_size(), shape.group_size());
  if (!tiles.done()) {
    load_queries(tiles.current(), 0);
  }
  int stage = 0;
  while (!tiles.done()) {
    const QueryTile at = tiles.current();
    rules.advance(tiles, tile.tile);
    ptx::cp_async_wait_all();
    __syncthreads();
    if (!tiles.done()) {
      load_queries(tiles.current(), stage ^ 1);
    }
    const auto& s_q = s.queries[stage].q;
    const auto& s_dout = s.queries[stage].dout;
    const int first_query = at.tile * kTileM;
    const int row = ScoreGrid::row();
    const int col = ScoreGrid::col();

    typename ScoreGrid::Sum r_p;
    typename ScoreGrid::Sum r_ds;
    const Range tile_queries = {first_query, min(first_query + kTileM, sequence_q.length)};
    if constexpr (Traits::kGeneral) {
      find_general_scores<Traits, GradientOf::kProducts>(params, rules, s, stage, at, tile.tile,
                                                         r_p, r_ds);
    } else {
      find_scores<Traits>(
          params, rules, s, stage, at, tile.tile,
          [&] { return device::covers(unmasked_queries, tile_queries); }, r_p, r_ds);
    }
    if (ScoreGrid::leads()) {
      device::store_elements(r_p, s.p, row, col);
      device::store_elements(r_ds, s.ds, row, col);
    }
    __syncthreads();

    device::accumulate_atb(r_dv, s.p, KeyGrid::row(), s_dout, KeyGrid::col());
    device::accumulate_atb(r_dk, s.ds, KeyGrid::row(), s_q, KeyGrid::col());

    const int64_t index = workspace.index(at.head, first_tile + at.tile);
    device::InTurn in_turn = rules.in_turn(workspace, index, at, tile_queries, tile.tile);
#pragma unroll
    for (int dq_col = 0; dq_col < kHeadDim; dq_col += kDqCols) {
      typename QueryGrid::Sum r_dq;
      r_dq.clear();
      device::accumulate_ab(r_dq, s.ds, QueryGrid::row(), s.k, dq_col + QueryGrid::col());
      QueryGrid::add(workspace.dq_sum(index) + kTileM * dq_col, r_dq);
    }
    in_turn.end();
    stage ^= 1;
  }

  // Where no query sees these keys, the copies of k and v are still under way here.
  ptx::cp_async_wait_all();
  __syncthreads();
  r_dk.scale(softmax_scale);
  rules.scale_dv(r_dv);
  if (KeyGrid::leads()) {
    device::store_elements(r_dk, s.k, KeyGrid::row(), KeyGrid::col());
    device::store_elements(r_dv, s.v, KeyGrid::row(), KeyGrid::col());
  }
  __syncthreads();
  s.k.template store<kThreads>(key_rows(params.dk, shape.head_dim));
  s.v.template store<kThreads>(key_rows(params.dv, shape.head_dim_v));
}

// dq = softmax_scale * (its sums), one tile of queries of one head per block.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    flash_bwd_dq_sm80(const __grid_constant__ BwdParams params, const TileScheduler scheduler) {
  using Element = typename Traits::Element;
  using QueryGrid = typename Traits::QueryGrid;
  constexpr int kThreads = Traits::kThreads;

  auto& s_dq = device::shared_memory<typename Traits::template Rows<Traits::kTileM>>();
  const Shape& shape = params.shape;
  const WorkTile tile =
      device::in_sequence(scheduler.at(scheduler.first + blockIdx.x), params.queries, shape.batch,
                          shape.seqlen_q, Traits::kTileM);
  const Sequence sequence = params.queries.at(tile.batch, shape.seqlen_q);
  const int first_query = tile.tile * Traits::kTileM;
  if (first_query >= sequence.length) {
    return;
  }
  const int64_t first_tile = params.queries.first_tile(tile.batch, shape.seqlen_q, Traits::kTileM);
  const float* g_sums =
      params.workspace.dq_sum(params.workspace.index(tile.head, first_tile + tile.tile));
#pragma unroll
  for (int dq_col = 0; dq_col < Traits::kHeadDim; dq_col += Traits::kDqCols) {
    typename QueryGrid::Sum r_dq;
    QueryGrid::load(g_sums + Traits::kTileM * dq_col, r_dq);
    r_dq.scale(static_cast<float>(params.softmax_scale));
    device::store_elements(r_dq, s_dq, QueryGrid::row(), dq_col + QueryGrid::col());
  }
  __syncthreads();
  s_dq.template store<kThreads>(device::global_tile<Element>(
      params.dq, sequence, tile.batch, first_query, tile.head, shape.head_dim));
}

}  // namespace fa::sm80
