// SPDX-License-Identifier: BSD-3-Clause
// A sink is a score that has no value: its p = exp(sink - lse), its dp is 0, and so its gradient
//   p * (0 - delta),
// summed over the queries of its head. A warp sums a tile of queries of the workspace; another
// kernel then sums the tiles.
#include "support/dsinks.h"

#include "device/work_order.cuh"
#include "support/launch.cuh"
#include "support/sum_tiles.h"

namespace fa::support {
namespace {

__global__ void __launch_bounds__(ptx::kWarpSize)
    flash_dsinks(const __grid_constant__ BwdParams params, const TileScheduler scheduler) {
  const Shape& shape = params.shape;
  const BwdWorkspace& workspace = params.workspace;
  const WorkTile item = scheduler.at(scheduler.first + blockIdx.x);
  const WorkTile tile =
      device::in_sequence(item, params.queries, shape.batch, shape.seqlen_q, workspace.tile_m);
  const int64_t number = int64_t{item.batch} * scheduler.tiles + item.tile;
  const int64_t index = workspace.index(item.head, number);
  const float sink_log2 = params.rules.terms.sinks.at<const float>(0, item.head) * kLog2E;
  const int queries =
      params.queries.at(tile.batch, shape.seqlen_q).length - tile.tile * workspace.tile_m;
  float sum = 0.0f;
  for (int row = ptx::lane_index(); row < min(queries, workspace.tile_m); row += ptx::kWarpSize) {
    // Where nothing is seen and the sink is none, lse_log2 is inf, for -inf.
    const float p = ptx::exp2_approx(sink_log2 - workspace.lse_log2(index)[row]);
    sum -= p == 0.0f ? 0.0f : p * workspace.delta(index)[row];
  }
#pragma unroll
  for (int distance = ptx::kWarpSize / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(~0u, sum, distance);
  }
  if (ptx::lane_index() == 0) {
    params.dsinks.at<float>(item.head, number) = sum;
  }
}

}  // namespace

void launch_dsinks(const BwdParams& params, void* stream) {
  if (params.dsinks.sums.data == nullptr) {
    return;
  }
  const Shape& shape = params.shape;
  const int tile_m = params.workspace.tile_m;
  launch<flash_dsinks>(
      "flash_dsinks", params,
      schedule(params.queries, shape.batch, shape.seqlen_q, tile_m, shape.num_heads),
      ptx::kWarpSize, 0, stream);
  launch_sum_tiles(params.dsinks, params.queries, shape, shape.seqlen_q, tile_m, stream);
}

}  // namespace fa::support
