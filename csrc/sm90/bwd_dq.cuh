// SPDX-License-Identifier: BSD-3-Clause
// The sums of dq in global memory: each math warpgroup adds its share of a tile, and when all are
// there dq is written from them. Nobody reads them by row and column: each warp's part of 8 columns
// is 128 consecutive floats, so that whole lines are added and read.
#pragma once

#include "common/params.h"
#include "common/scheduler.h"
#include "device/convert.cuh"
#include "ptx/reduce.cuh"
#include "sm90/bwd_traits.h"

namespace fa::sm90 {

// visit(block, g_lane): where this lane's four floats of an 8-column block of its share lie.
template <typename Traits, typename Float, typename Visit>
FA_DEVICE void each_dq_block(Float* g_sums, int warpgroup, Visit&& visit) {
  using Dq = typename Traits::Dq;
  constexpr int kFloatsOfShare = device::kWarpgroupRows * Dq::kCols;
  constexpr int kFloatsOfWarp = device::kBlockRows * device::kBlockCols;
  const int warp = static_cast<int>(threadIdx.x) / ptx::kWarpSize % 4;
  Float* g_lane = ptx::lane_of_block(g_sums + warpgroup * kFloatsOfShare + warp * kFloatsOfWarp);
#pragma unroll
  for (int block = 0; block < Dq::kColBlocks; ++block) {
    if (Traits::kHeadDim % Dq::kCols == 0 ||
        Traits::dq_col(warpgroup) + block * device::kBlockCols < Traits::kHeadDim) {
      visit(block, g_lane + block * 4 * kFloatsOfWarp);
    }
  }
}

// By one warpgroup.
template <typename Traits>
FA_DEVICE void add_dq(float* g_sums, int warpgroup, const typename Traits::Dq& r_dq) {
  each_dq_block<Traits>(g_sums, warpgroup, [&](int block, float* g_lane) {
    ptx::reduce_add_block(g_lane, r_dq.r[0][block]);
  });
}

// dq = softmax_scale * (its sums), one tile of queries of one head per block.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kMathThreads)
    flash_bwd_dq_sm90(const __grid_constant__ BwdParams params, const TileScheduler scheduler) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Element = typename Traits::Element;
  auto& s_dq = device::shared_memory<typename Traits::template Rows<Traits::kTileM>>();
  const WorkTile tile = scheduler.at(scheduler.first + blockIdx.x);
  const Sequence sequence = params.queries.at(tile.batch, params.shape.seqlen_q);
  const int first_query = tile.tile * Traits::kTileM;
  if (first_query >= sequence.length) {
    return;
  }
  const int64_t first_tile =
      params.queries.first_tile(tile.batch, params.shape.seqlen_q, Traits::kTileM);
  const float* g_sums =
      params.workspace.dq_sum(params.workspace.index(tile.head, first_tile + tile.tile));
  const int warpgroup = static_cast<int>(threadIdx.x) / device::kWarpgroupThreads;
  const int warp = static_cast<int>(threadIdx.x) / ptx::kWarpSize % 4;
  typename Traits::Dq r_dq;
  r_dq.clear();  // columns that a row does not have
  each_dq_block<Traits>(g_sums, warpgroup, [&](int block, const float* g_lane) {
    ptx::load_block(g_lane, r_dq.r[0][block]);
  });
  r_dq.scale(static_cast<float>(params.softmax_scale));
  device::store_blocks(device::to_operand<Element>(r_dq), s_dq,
                       Traits::dq_row(warpgroup) + warp * device::kBlockRows,
                       Traits::dq_col(warpgroup));
  __syncthreads();
  s_dq.template store<Traits::kMathThreads>(device::global_tile<Element>(
      params.dq, sequence, tile.batch, first_query, tile.head, params.shape.head_dim));
#else
  __trap();  // rather than leave dq out as it was
#endif
}

}  // namespace fa::sm90
