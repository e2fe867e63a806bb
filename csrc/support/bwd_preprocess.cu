// SPDX-License-Identifier: BSD-3-Clause
// delta = rowsum(dout * out) - dlse. Eight lanes share a row and read 16 bytes each at a time, so a
// group reads whole 128-byte lines.

#include "common/scheduler.h"
#include "device/convert.cuh"
#include "support/bwd_preprocess.h"
#include "support/launch.cuh"

namespace fa::support {
namespace {

constexpr int kThreads = 256;
constexpr int kLanesPerRow = 8;
constexpr int kRowsPerBlock = kThreads / kLanesPerRow;
constexpr int kElementsPerLoad = 8;

// Eight consecutive elements, as one load.
template <typename Element>
struct alignas(16) Pack {
  Element elements[kElementsPerLoad];
};

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    flash_bwd_preprocess(const __grid_constant__ BwdParams params, const TileScheduler scheduler) {
  const Shape& shape = params.shape;
  const int row_of_block = static_cast<int>(threadIdx.x) / kLanesPerRow;
  const int lane_of_row = static_cast<int>(threadIdx.x) % kLanesPerRow;

  for (int64_t work = blockIdx.x; work < scheduler.count(); work += gridDim.x) {
    const WorkTile tile = scheduler.at(work);
    const int query = tile.tile * kRowsPerBlock + row_of_block;
    const bool exists = query < shape.seqlen_q;

    float sum = 0.0f;
    if (exists) {
      const auto* g_out = params.out.row<const Element>(tile.batch, query, tile.head);
      const auto* g_dout = params.dout.row<const Element>(tile.batch, query, tile.head);
      for (int col = lane_of_row * kElementsPerLoad; col < shape.head_dim;
           col += kLanesPerRow * kElementsPerLoad) {
        const auto r_out = *reinterpret_cast<const Pack<Element>*>(g_out + col);
        const auto r_dout = *reinterpret_cast<const Pack<Element>*>(g_dout + col);
#pragma unroll
        for (int i = 0; i < kElementsPerLoad; ++i) {
          sum += device::to_float(r_out.elements[i]) * device::to_float(r_dout.elements[i]);
        }
      }
    }
#pragma unroll
    for (int distance = kLanesPerRow / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(~0u, sum, distance);
    }

    if (exists && lane_of_row == 0) {
      const int64_t row = shape.row_statistics_offset(tile.batch, tile.head) + query;
      const auto* g_dlse = static_cast<const float*>(params.dlse);
      static_cast<float*>(params.delta)[row] = g_dlse == nullptr ? sum : sum - g_dlse[row];
    }
  }
}

}  // namespace

template <typename Element>
void launch_bwd_preprocess(const BwdParams& params, void* stream) {
  const Shape& shape = params.shape;
  const TileScheduler scheduler = {ceil_div(shape.seqlen_q, kRowsPerBlock), shape.num_heads,
                                   shape.batch};
  launch<flash_bwd_preprocess<Element>>("flash_bwd_preprocess", params, scheduler, kThreads, 0,
                                        stream);
}

template void launch_bwd_preprocess<__nv_bfloat16>(const BwdParams&, void*);
template void launch_bwd_preprocess<__half>(const BwdParams&, void*);

}  // namespace fa::support
