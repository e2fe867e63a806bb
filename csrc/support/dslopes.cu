// SPDX-License-Identifier: BSD-3-Clause
// A block owns a tile of keys of one head of queries, and sums over those that see some of them
//   ds * -|how far the key lies from the one that is aligned with the query|;
// another kernel then sums the tiles of each slope.
#include "support/dslopes.h"

#include "device/dropout.cuh"
#include "device/work_order.cuh"
#include "support/launch.cuh"
#include "support/score_tiles.cuh"
#include "support/sum_tiles.h"

namespace fa::support {
namespace {

// Of a thread's rows of queries, as the workspace has them.
template <typename Sum>
struct Statistics {
  float lse_log2[Sum::kRowsPerThread];
  float delta[Sum::kRowsPerThread];

  FA_DEVICE Statistics(const BwdParams& params, const WorkTile& at, int first_query) {
    const BwdWorkspace& workspace = params.workspace;
    const int seqlen_q = params.shape.seqlen_q;
    const int last = params.queries.at(at.batch, seqlen_q).length - 1;
    const int64_t first_tile = params.queries.first_tile(at.batch, seqlen_q, workspace.tile_m);
#pragma unroll
    for (int row = 0; row < Sum::kRowsPerThread; ++row) {
      const int query = min(first_query + Sum::row(row), last);
      const int tile = query / workspace.tile_m;
      const int row_of_tile = query - tile * workspace.tile_m;
      const int64_t index = workspace.index(at.head, first_tile + tile);
      lse_log2[row] = __ldg(workspace.lse_log2(index) + row_of_tile);
      delta[row] = __ldg(workspace.delta(index) + row_of_tile);
    }
  }
};

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
  const auto rows = [&](const TensorView& view, const Sequence& sequence, int first, int head,
                        int cols) {
    return device::global_tile<Element>(view, sequence, keys.batch, first, head, cols);
  };

  Tiles tiles(s);
  float sum = 0.0f;
  Tiles::each_seen(params, keys, [&](const auto& rules, int first_query, const auto& seen) {
    const int query = first_query + Grid::row();
    const int key = first_key + Grid::col();
    const int head_kv = keys.head / shape.group_size();
    const Sequence sequence_q = params.queries.at(keys.batch, shape.seqlen_q);
    const Sequence sequence_k = params.keys.at(keys.batch, shape.seqlen_k);
    Sum r_products[2];
    tiles.multiply({{rows(params.q, sequence_q, first_query, keys.head, shape.head_dim),
                     rows(params.k, sequence_k, first_key, head_kv, shape.head_dim)},
                    {rows(params.dout, sequence_q, first_query, keys.head, shape.head_dim_v),
                     rows(params.v, sequence_k, first_key, head_kv, shape.head_dim_v)}},
                   r_products);
    auto& [r_scores, r_ds] = r_products;  // first dp
    rules.finish_scores(r_scores, static_cast<float>(params.softmax_scale), query, key);
    if (dropout.any()) {
      device::drop(r_ds, {dropout, keys.batch, keys.head, shape.num_heads}, query, key);
      r_ds.scale(static_cast<float>(dropout.scale));
    }
    const Statistics<Sum> statistics(params, keys, query);
    r_ds.transform([&](float dp, int row, int block, int i) {
      const float score = r_scores.r[row / 2][block][i];
      return ptx::exp2_approx(fmaf(score, kLog2E, -statistics.lse_log2[row])) *
             (dp - statistics.delta[row]);
    });
    device::keep_seen(r_ds, seen, 0.0f);
    const WindowMask window = params.window.over(sequence_q.length, sequence_k.length);
    const device::AlibiDistances<Sum> distances(window, query, key);
    r_ds.transform([&](float ds, int row, int block, int i) {
      sum = fmaf(-ds, distances.at(row, block, i), sum);
      return ds;
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

}  // namespace fa::support
