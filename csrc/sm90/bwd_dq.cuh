// SPDX-License-Identifier: BSD-3-Clause
// The sums of dq in global memory: each math warpgroup adds its share of a tile, and when all are
// there dq is written from them. Nobody reads them by row and column: each warp's part of 8 columns
// is 128 consecutive floats, so that whole lines are added and read.
#pragma once

#include "common/params.h"
#include "common/scheduler.h"
#include "device/convert.cuh"
#include "device/work_order.cuh"
#include "ptx/barrier.cuh"
#include "ptx/reduce.cuh"
#include "sm90/bwd_traits.h"

namespace fa::sm90 {

template <typename Traits>
inline constexpr int kFloatsOfDqShare = device::kWarpgroupRows * Traits::Dq::kCols;
inline constexpr int kDqFloatsOfWarp = device::kBlockRows * device::kBlockCols;

// Where this lane's first four floats of a share lie. Computed where it is needed, rather than kept
// in registers.
template <typename Traits, typename Float>
FA_DEVICE Float* dq_lane(Float* g_sums, int share) {
  const uint32_t warp = ptx::opaque(threadIdx.x) / ptx::kWarpSize % 4;
  return ptx::lane_of_block(g_sums + share * kFloatsOfDqShare<Traits> + warp * kDqFloatsOfWarp);
}

// visit(block, g_floats): where this lane's four floats of an 8-column block of a share lie.
template <typename Traits, typename Share, typename Float, typename Visit>
FA_DEVICE void each_dq_block(Float* g_lane, int share, Visit&& visit) {
#pragma unroll
  for (int block = 0; block < Share::kColBlocks; ++block) {
    if (Traits::kHeadDim % Share::kCols == 0 ||
        Traits::dq_col(share) + block * device::kBlockCols < Traits::kHeadDim) {
      visit(block, g_lane + block * 4 * kDqFloatsOfWarp);
    }
  }
}

// By one warpgroup.
template <typename Traits, typename Share>
FA_DEVICE void add_dq(float* g_lane, int share, const Share& r_dq) {
  each_dq_block<Traits, Share>(g_lane, share, [&](int block, float* g_floats) {
    ptx::reduce_add_block(g_floats, r_dq.r[0][block]);
  });
}

// dq = softmax_scale * (its sums), one tile of queries of one head per block.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kDqThreads)
    flash_bwd_dq_sm90(const __grid_constant__ BwdParams params, const TileScheduler scheduler) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Element = typename Traits::Element;
  auto& s_dq = device::shared_memory<typename Traits::DqTile>();
  ptx::wait_for_previous_kernel();
  const WorkTile tile =
      device::in_sequence(scheduler.at(scheduler.first + blockIdx.x), params.queries,
                          params.shape.batch, params.shape.seqlen_q, Traits::kTileM);
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
  each_dq_block<Traits, typename Traits::Dq>(
      dq_lane<Traits>(g_sums, warpgroup), warpgroup,
      [&](int block, const float* g_floats) { ptx::load_block(g_floats, r_dq.r[0][block]); });
  r_dq.scale(static_cast<float>(params.softmax_scale));
  device::store_blocks(device::to_operand<Element>(r_dq), s_dq,
                       Traits::dq_row(warpgroup) + warp * device::kBlockRows,
                       Traits::dq_col(warpgroup));
  __syncthreads();
  s_dq.template store<Traits::kDqThreads>(device::global_tile<Element>(
      params.dq, sequence, tile.batch, first_query, tile.head, params.shape.head_dim));
#else
  __trap();  // rather than leave dq out as it was
#endif
}

}  // namespace fa::sm90
