// SPDX-License-Identifier: BSD-3-Clause
// A block owns a tile of keys of one head of queries, and sums ds * -distance over all pairs, where
// the distance is that between a key and the one that is aligned with the query. Another kernel
// then sums the tiles of each slope.
#include "support/dslopes.h"

#include "device/dropout.cuh"
#include "device/work_order.cuh"
#include "support/launch.cuh"
#include "support/score_tiles.cuh"
#include "support/sum_tiles.h"

namespace fa::support {
namespace {

// Of a thread's rows of queries, what of_tile(index) of the workspace has.
template <typename Sum, typename OfTile>
FA_DEVICE void load_statistics(typename Sum::RowValues& values, const BwdParams& params,
                               const WorkTile& at, int first_query, OfTile&& of_tile) {
  const BwdWorkspace& workspace = params.workspace;
  const int seqlen_q = params.shape.seqlen_q;
  const int last = params.queries.at(at.batch, seqlen_q).length - 1;
  const int64_t first_tile = params.queries.first_tile(at.batch, seqlen_q, workspace.tile_m);
#pragma unroll
  for (int row = 0; row < Sum::kRowsPerThread; ++row) {
    const int query = min(first_query + Sum::row(row), last);
    const int tile = query / workspace.tile_m;
    const float* g_tile = of_tile(workspace.index(at.head, first_tile + tile));
    values[row] = g_tile[query - tile * workspace.tile_m];
  }
}

template <typename Element>
__global__ void __launch_bounds__(ScoreTiles<Element>::kThreads, ScoreTiles<Element>::kBlocks)
    flash_dslopes(const __grid_constant__ BwdParams params, const TileScheduler scheduler) {
  using Tiles = ScoreTiles<Element>;
  using Grid = typename Tiles::Grid;
  using Sum = typename Tiles::Sum;
  auto& s = device::shared_memory<typename Tiles::SharedMemory>();
  const Shape& shape = params.shape;
  const Dropout& dropout = params.rules.terms.dropout;
  const WorkTile item = scheduler.at(scheduler.first + blockIdx.x);
  const WorkTile keys =
      device::in_sequence(item, params.keys, shape.batch, shape.seqlen_k, Tiles::kTileN);
  const int first_key = keys.tile * Tiles::kTileN;
  // What the products of a tile of queries are made of.
  const auto of_queries = [&](const TensorView& view, int first_query, int cols) {
    const int batch = static_cast<int>(ptx::opaque(keys.batch));
    return device::global_tile<Element>(view, params.queries.at(batch, shape.seqlen_q), batch,
                                        first_query, keys.head, cols);
  };
  const auto of_keys = [&](const TensorView& view, int cols) {
    const int batch = static_cast<int>(ptx::opaque(keys.batch));
    return device::global_tile<Element>(view, params.keys.at(batch, shape.seqlen_k), batch,
                                        first_key, keys.head / shape.group_size(), cols);
  };

  Tiles tiles(s);
  float sum = 0.0f;
  Tiles::each_seen(params, keys, [&](const auto& rules, int first_query, const auto& seen) {
    const int query = first_query + Grid::row();
    const int key = first_key + Grid::col();
    const auto scores = [&] {
      return typename Tiles::Operands{of_queries(params.q, first_query, shape.head_dim),
                                      of_keys(params.k, shape.head_dim)};
    };
    const auto gradients = [&] {
      return typename Tiles::Operands{of_queries(params.dout, first_query, shape.head_dim_v),
                                      of_keys(params.v, shape.head_dim_v)};
    };
    const BwdWorkspace& workspace = params.workspace;

    Sum r_p;
    tiles.begin(scores());
    tiles.multiply(r_p, scores, [&] { tiles.begin(gradients()); });
    rules.finish_scores(r_p, static_cast<float>(params.softmax_scale), query, key);
    typename Sum::RowValues lse_log2;
    load_statistics<Sum>(lse_log2, params, keys, query,
                         [&](int64_t index) { return workspace.lse_log2(index); });
    r_p.transform([&](float score, int row, int, int) {
      return ptx::exp2_approx(fmaf(score, kLog2E, -lse_log2[row]));
    });
    device::keep_seen(r_p, seen, 0.0f);

    Sum r_dp;
    tiles.multiply(r_dp, gradients, [] {});
    if (dropout.any()) {
      device::drop(r_dp, {dropout, keys.batch, keys.head, shape.num_heads}, query, key);
      r_dp.scale(static_cast<float>(dropout.scale));
    }
    typename Sum::RowValues delta;
    load_statistics<Sum>(delta, params, keys, query,
                         [&](int64_t index) { return workspace.delta(index); });
    const device::AlibiDistances<Sum> distances(rules.window(), query, key);
    r_p.transform([&](float p, int row, int block, int i) {
      const float ds = p * (r_dp.r[row / 2][block][i] - delta[row]);
      const float of_pair = p == 0.0f ? 0.0f : ds;  // dp of a hidden key may be infinite
      sum = fmaf(-of_pair, distances.at(row, block, i), sum);
      return p;
    });
  });
  sum = tiles.reduce(sum, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0) {
    params.dslopes.at<float>(item.head, int64_t{item.batch} * scheduler.tiles + item.tile) = sum;
  }
}

}  // namespace

template <typename Element>
void launch_dslopes(const BwdParams& params, void* stream) {
  using Tiles = ScoreTiles<Element>;
  if (params.dslopes.sums.data == nullptr) {
    return;
  }
  const Shape& shape = params.shape;
  launch<flash_dslopes<Element>>(
      "flash_dslopes", params,
      schedule(params.keys, shape.batch, shape.seqlen_k, Tiles::kTileN, shape.num_heads),
      Tiles::kThreads, sizeof(typename Tiles::SharedMemory), stream);
  launch_sum_tiles(params.dslopes, params.keys, shape, shape.seqlen_k, Tiles::kTileN, stream);
}

template void launch_dslopes<__nv_bfloat16>(const BwdParams&, void*);
template void launch_dslopes<__half>(const BwdParams&, void*);
template void launch_dslopes<float>(const BwdParams&, void*);

}  // namespace fa::support
