// SPDX-License-Identifier: BSD-3-Clause
// The gradient of a bias is ds, summed over what the bias was broadcast to. A block owns a tile of
// one matrix (queries, keys) of the bias, adds up all tiles of ds that share it, one after another,
// and writes it once: the order of the sum is fixed. Along a dimension that is broadcast there is
// one tile for all, whose rows or columns are added up in the end.
#pragma once

#include "common/dbias_tiles.h"
#include "common/params.h"
#include "common/scheduler.h"
#include "device/convert.cuh"
#include "device/smem.cuh"
#include "sm80/bwd_scores.cuh"

namespace fa::sm80 {

// Tiles of queries by tiles of keys, heads and batch entries of a bias.
template <typename Traits>
TileScheduler dbias_schedule(const BwdParams& params) {
  const Shape& shape = params.shape;
  const ScoreTensor& dbias = params.dbias;
  const bool is_empty = shape.seqlen_q == 0 || shape.seqlen_k == 0 || shape.batch == 0;
  const int tiles = entries_of(ceil_div(shape.seqlen_q, Traits::kTileM), dbias.query_stride) *
                    entries_of(ceil_div(shape.seqlen_k, Traits::kTileN), dbias.key_stride);
  return {is_empty ? 0 : tiles, entries_of(shape.num_heads, dbias.head_stride),
          entries_of(shape.batch, dbias.batch_stride)};
}

template <int kRows, int kCols>
struct DbiasTile {
  float sums[kRows][kCols];

  // By all kThreads of the block, which must meet before; they meet after each step.
  template <int kThreads>
  FA_DEVICE void add_rows() {
    for (int col = static_cast<int>(threadIdx.x); col < kCols; col += kThreads) {
      for (int row = 1; row < kRows; ++row) {
        sums[0][col] += sums[row][col];
      }
    }
    __syncthreads();
  }
  template <int kThreads>
  FA_DEVICE void add_cols() {
    for (int row = static_cast<int>(threadIdx.x); row < kRows; row += kThreads) {
      for (int col = 1; col < kCols; ++col) {
        sums[row][0] += sums[row][col];
      }
    }
    __syncthreads();
  }

  // The first rows and cols, to (first_query, first_key) of a head of the gradient.
  template <int kThreads, typename Element>
  FA_DEVICE void store(const ScoreTensor& dbias, const WorkTile& at, int first_query, int first_key,
                       int rows, int cols) const {
    Element* g_head = dbias.of_head<Element>(at.batch, at.head);
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kCols; i += kThreads) {
      const int row = i / kCols;
      const int col = i % kCols;
      if (row < rows && col < cols) {
        g_head[dbias.offset(first_query + row, first_key + col)] =
            device::from_float<Element>(sums[row][col]);
      }
    }
  }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    flash_dbias_sm80(const __grid_constant__ BwdParams params, const TileScheduler scheduler) {
  using Element = typename Traits::Element;
  using ScoreGrid = typename Traits::ScoreGrid;
  constexpr int kTileM = Traits::kTileM;
  constexpr int kTileN = Traits::kTileN;
  constexpr int kThreads = Traits::kThreads;
  using Tile = DbiasTile<kTileM, kTileN>;
  static_assert(sizeof(Tile) <= sizeof(typename Traits::SharedMemory));

  auto& s = device::shared_memory<typename Traits::SharedMemory>();
  const Shape& shape = params.shape;
  const ScoreTensor& dbias = params.dbias;
  const BwdWorkspace& workspace = params.workspace;

  const WorkTile item = scheduler.at(scheduler.first + blockIdx.x);
  const int key_tiles_of_bias = entries_of(ceil_div(shape.seqlen_k, kTileN), dbias.key_stride);
  const int query_tile_of_bias = item.tile / key_tiles_of_bias;
  const int key_tile_of_bias = item.tile % key_tiles_of_bias;
  const Range batches = shared_range(item.batch, shape.batch, dbias.batch_stride);
  const Range heads = shared_range(item.head, shape.num_heads, dbias.head_stride);

  typename ScoreGrid::Sum r_sum;
  r_sum.clear();
  for (int batch = batches.begin; batch < batches.end; ++batch) {
    const Sequence sequence_q = params.queries.at(batch, shape.seqlen_q);
    const Sequence sequence_k = params.keys.at(batch, shape.seqlen_k);
    const WindowMask window = params.window.over(sequence_q.length, sequence_k.length);
    const typename Traits::Rules rules(params, window, batch);
    const int64_t first_tile = params.queries.first_tile(batch, shape.seqlen_q, kTileM);
    const Range query_tiles =
        shared_range(query_tile_of_bias, ceil_div(sequence_q.length, kTileM), dbias.query_stride);
    const Range key_tiles =
        shared_range(key_tile_of_bias, ceil_div(sequence_k.length, kTileN), dbias.key_stride);

    const auto load = [&](const TensorView& view, const Sequence& sequence, int first_row, int head,
                          int cols, auto& s_tile) {
      s_tile.template load_async<kThreads>(
          device::global_tile<Element>(view, sequence, batch, first_row, head, cols));
    };
    const auto add_tile = [&](const QueryTile& at, int key_tile) {
      const int first_query = at.tile * kTileM;
      const int first_key = key_tile * kTileN;
      const int head_kv = at.head / shape.group_size();
      load(params.q, sequence_q, first_query, at.head, shape.head_dim, s.queries[0].q);
      load(params.dout, sequence_q, first_query, at.head, shape.head_dim_v, s.queries[0].dout);
      load(params.k, sequence_k, first_key, head_kv, shape.head_dim, s.k);
      load(params.v, sequence_k, first_key, head_kv, shape.head_dim_v, s.v);
      load_statistics<kThreads>(s.statistics[0],
                                workspace.lse_log2(workspace.index(at.head, first_tile + at.tile)));
      ptx::cp_async_wait_all();
      __syncthreads();
      typename ScoreGrid::Sum r_p;
      typename ScoreGrid::Sum r_ds;
      find_general_scores<Traits, GradientOf::kScores>(params, rules, s, 0, at, key_tile, r_p,
                                                       r_ds);
      r_sum.transform(
          [&](float sum, int i, int block, int j) { return sum + r_ds.r[i / 2][block][j]; });
      __syncthreads();  // before the tiles are loaded again
    };
    for (int head = heads.begin; head < heads.end; ++head) {
      for (int query_tile = query_tiles.begin; query_tile < query_tiles.end; ++query_tile) {
        const auto next_from = [&](int key_tile) {
          return rules.next_key(head, query_tile, key_tile * kTileN, key_tiles.end * kTileN) /
                 kTileN;
        };
        for (int key_tile = next_from(key_tiles.begin); key_tile < key_tiles.end;
             key_tile = next_from(key_tile + 1)) {
          add_tile({head, query_tile}, key_tile);
        }
      }
    }
  }

  auto& s_tile = reinterpret_cast<Tile&>(s);
  if (ScoreGrid::leads()) {
    r_sum.transform([&](float sum, int i, int block, int j) {
      return s_tile.sums[ScoreGrid::row() + ScoreGrid::Sum::row(i)]
                        [ScoreGrid::col() + ScoreGrid::Sum::col(block, j)] = sum;
    });
  }
  __syncthreads();
  if (dbias.query_stride == 0) {
    s_tile.template add_rows<kThreads>();
  }
  if (dbias.key_stride == 0) {
    s_tile.template add_cols<kThreads>();
  }
  const int first_query = query_tile_of_bias * kTileM;
  const int first_key = key_tile_of_bias * kTileN;
  const int rows = entries_of(shape.seqlen_q, dbias.query_stride) - first_query;
  const int cols = entries_of(shape.seqlen_k, dbias.key_stride) - first_key;
  if (params.rules.bias_dtype == Dtype::kFloat32) {
    s_tile.template store<kThreads, float>(dbias, item, first_query, first_key, rows, cols);
  } else if (params.rules.bias_dtype == Dtype::kFloat16) {
    s_tile.template store<kThreads, __half>(dbias, item, first_query, first_key, rows, cols);
  } else {
    s_tile.template store<kThreads, __nv_bfloat16>(dbias, item, first_query, first_key, rows, cols);
  }
}

}  // namespace fa::sm80
