// SPDX-License-Identifier: BSD-3-Clause
// One tile of queries of one head per block. Eight lanes share a row and read 16 bytes each at a
// time, so a group reads whole 128-byte lines.

#include <cmath>

#include "common/scheduler.h"
#include "device/convert.cuh"
#include "device/work_order.cuh"
#include "support/bwd_preprocess.h"
#include "support/launch.cuh"

namespace fa::support {
namespace {

constexpr int kThreads = 256;
constexpr int kLanesPerRow = 8;
constexpr int kRowsPerStep = kThreads / kLanesPerRow;

template <typename Element>
constexpr int kElementsPerLoad = 16 / sizeof(Element);

// Consecutive elements, as one load.
template <typename Element>
struct alignas(16) Pack {
  Element elements[kElementsPerLoad<Element>];
};

// The part of rowsum(dout * out) that this lane of the row's eight reads; their sum is for all.
template <typename Element>
FA_DEVICE float row_dot(const Element* g_out, const Element* g_dout, int head_dim_v) {
  const int lane_of_row = static_cast<int>(threadIdx.x) % kLanesPerRow;
  float sum = 0.0f;
  for (int col = lane_of_row * kElementsPerLoad<Element>; col < head_dim_v;
       col += kLanesPerRow * kElementsPerLoad<Element>) {
    const auto r_out = *reinterpret_cast<const Pack<Element>*>(g_out + col);
    const auto r_dout = *reinterpret_cast<const Pack<Element>*>(g_dout + col);
#pragma unroll
    for (int i = 0; i < kElementsPerLoad<Element>; ++i) {
      sum += device::to_float(r_out.elements[i]) * device::to_float(r_dout.elements[i]);
    }
  }
  return sum;
}

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    flash_bwd_preprocess(const __grid_constant__ BwdParams params, const TileScheduler scheduler) {
  const BwdWorkspace& workspace = params.workspace;
  if (blockIdx.x == 0 && threadIdx.x == 0 && workspace.ticket() != nullptr) {
    *workspace.ticket() = 0;
  }
  const Shape& shape = params.shape;
  const WorkTile tile =
      device::in_sequence(scheduler.at(scheduler.first + blockIdx.x), params.queries, shape.batch,
                          shape.seqlen_q, workspace.tile_m);
  const Sequence sequence = params.queries.at(tile.batch, shape.seqlen_q);
  const int first_query = tile.tile * workspace.tile_m;
  if (first_query >= sequence.length) {
    return;
  }
  const int64_t index = workspace.index(
      tile.head,
      tile.tile + params.queries.first_tile(tile.batch, shape.seqlen_q, workspace.tile_m));

  for (int row = static_cast<int>(threadIdx.x) / kLanesPerRow; row < workspace.tile_m;
       row += kRowsPerStep) {
    const int query = first_query + row;
    const int64_t g_row = sequence.begin + query;
    const bool exists = query < sequence.length;
    const float lse =
        exists ? params.softmax_lse.row<float>(tile.batch, tile.head)[g_row] : -INFINITY;
    float delta = 0.0f;
    if (exists) {
      delta =
          row_dot(params.out.row<const Element>(tile.batch, g_row, tile.head),
                  params.dout.row<const Element>(tile.batch, g_row, tile.head), shape.head_dim_v);
    }
#pragma unroll
    for (int distance = kLanesPerRow / 2; distance > 0; distance /= 2) {
      delta += __shfl_xor_sync(~0u, delta, distance);
    }
    if (threadIdx.x % kLanesPerRow == 0) {
      if (exists && params.dlse.data != nullptr) {
        delta -= params.dlse.row<float>(tile.batch, tile.head)[g_row];
      }
      // +inf makes every p = exp2(score - lse) of a row that sees no key exactly 0.
      const bool sees_a_key = lse != -INFINITY;
      workspace.lse_log2(index)[row] = sees_a_key ? lse * kLog2E : INFINITY;
      workspace.delta(index)[row] = sees_a_key ? delta : 0.0f;
    }
  }

  auto* g_dq_sum = reinterpret_cast<float4*>(workspace.dq_sum(index));
  for (int i = static_cast<int>(threadIdx.x); i < workspace.tile_m * workspace.head_dim / 4;
       i += kThreads) {
    g_dq_sum[i] = {};
  }
  if (threadIdx.x == 0 && workspace.turn(index) != nullptr) {
    *workspace.turn(index) = 0;
  }
}

}  // namespace

template <typename Element>
void launch_bwd_preprocess(const BwdParams& params, void* stream) {
  const Shape& shape = params.shape;
  const TileScheduler scheduler = schedule(params.queries, shape.batch, shape.seqlen_q,
                                           params.workspace.tile_m, shape.num_heads);
  launch<flash_bwd_preprocess<Element>>("flash_bwd_preprocess", params, scheduler, kThreads, 0,
                                        stream);
}

template void launch_bwd_preprocess<__nv_bfloat16>(const BwdParams&, void*);
template void launch_bwd_preprocess<__half>(const BwdParams&, void*);
template void launch_bwd_preprocess<float>(const BwdParams&, void*);

}  // namespace fa::support
