// SPDX-License-Identifier: BSD-3-Clause
// A warp for each sum; lanes take turns, so that the order is always the same.
#include "support/sum_tiles.h"

#include "ptx/common.cuh"
#include "support/launch.cuh"

namespace fa::support {
namespace {

__global__ void __launch_bounds__(ptx::kWarpSize)
    flash_sum_tiles(const __grid_constant__ HeadGradient gradient,
                    const __grid_constant__ Sequences sequences, int heads, int64_t all_tiles,
                    int seqlen, int tile_rows) {
  const int batch = static_cast<int>(blockIdx.x) / heads;
  const int head = static_cast<int>(blockIdx.x) % heads;
  const bool is_of_all = gradient.sums.batch_stride == 0;
  const int64_t begin = is_of_all ? 0 : sequences.first_tile(batch, seqlen, tile_rows);
  const int64_t end = is_of_all ? all_tiles : sequences.first_tile(batch + 1, seqlen, tile_rows);
  float sum = 0.0f;
  for (int64_t tile = begin + ptx::lane_index(); tile < end; tile += ptx::kWarpSize) {
    sum += gradient.at<float>(head, tile);
  }
#pragma unroll
  for (int distance = ptx::kWarpSize / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(~0u, sum, distance);
  }
  if (ptx::lane_index() == 0) {
    gradient.sums.at<float>(batch, head) = sum;
  }
}

}  // namespace

void launch_sum_tiles(const HeadGradient& gradient, const Sequences& sequences, const Shape& shape,
                      int seqlen, int tile_rows, void* stream) {
  const int batch = gradient.sums.batch_stride == 0 ? min(shape.batch, 1) : shape.batch;
  if (int64_t{batch} * shape.num_heads == 0) {
    return;
  }
  start<flash_sum_tiles, Begin::kAfterPrevious>(
      "flash_sum_tiles", batch * shape.num_heads, ptx::kWarpSize, 0, stream, gradient, sequences,
      shape.num_heads, sequences.count_tiles(shape.batch, sequences.packed_rows, seqlen, tile_rows),
      seqlen, tile_rows);
}

}  // namespace fa::support
