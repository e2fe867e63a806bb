// SPDX-License-Identifier: BSD-3-Clause
// The scores of each tile of keys of a head once more, since forward is not made to wait for what
// is rarely asked for.
#include "support/max_logit.h"

#include "device/work_order.cuh"
#include "support/launch.cuh"
#include "support/score_tiles.cuh"

namespace fa::support {
namespace {

// Floats are in the order of their bits where they are positive, and in the opposite one where they
// are negative. No NaN.
FA_DEVICE void raise_to(float* g_largest, float value) {
  if (value >= 0.0f) {
    atomicMax(reinterpret_cast<int*>(g_largest), __float_as_int(value + 0.0f));  // -0 becomes 0
  } else {
    atomicMin(reinterpret_cast<unsigned*>(g_largest), __float_as_uint(value));
  }
}

template <typename Element>
__global__ void __launch_bounds__(ScoreTiles<Element>::kThreads, ScoreTiles<Element>::kBlocks)
    flash_max_logit(const __grid_constant__ FwdParams params, const TileScheduler scheduler) {
  using Tiles = ScoreTiles<Element>;
  using Grid = typename Tiles::Grid;
  auto& s = device::shared_memory<typename Tiles::SharedMemory>();
  const Shape& shape = params.shape;
  const WorkTile keys = device::in_sequence(scheduler.at(scheduler.first + blockIdx.x), params.keys,
                                            shape.batch, shape.seqlen_k, Tiles::kTileN);
  const int first_key = keys.tile * Tiles::kTileN;
  Tiles tiles(s);
  float largest = -INFINITY;
  Tiles::each_seen(params, keys, [&](const auto& rules, int first_query, const auto& seen) {
    const auto rows = [&](const TensorView& view, const Sequence& sequence, int first, int head) {
      return device::global_tile<Element>(view, sequence, keys.batch, first, head, shape.head_dim);
    };
    const auto operands = [&] {
      return typename Tiles::Operands{
          rows(params.q, params.queries.at(keys.batch, shape.seqlen_q), first_query, keys.head),
          rows(params.k, params.keys.at(keys.batch, shape.seqlen_k), first_key,
               keys.head / shape.group_size())};
    };
    typename Tiles::Sum r_scores;
    tiles.begin(operands());
    tiles.multiply(r_scores, operands, [] {});
    rules.finish_scores(r_scores, static_cast<float>(params.softmax_scale),
                        first_query + Grid::row(), first_key + Grid::col());
    device::keep_seen(r_scores, seen, -INFINITY);
    r_scores.for_each([&](float score, int) { largest = fmaxf(largest, score); });
  });
  largest = tiles.reduce(largest, [](float a, float b) { return fmaxf(a, b); });
  if (threadIdx.x == 0 && largest != -INFINITY) {
    raise_to(&params.rules.terms.max_logit.at<float>(0, keys.head), largest);
  }
}

}  // namespace

template <typename Element>
void launch_max_logit(const FwdParams& params, void* stream) {
  using Tiles = ScoreTiles<Element>;
  if (params.rules.terms.max_logit.data == nullptr) {
    return;
  }
  const Shape& shape = params.shape;
  launch<flash_max_logit<Element>>(
      "flash_max_logit", params,
      schedule(params.keys, shape.batch, shape.seqlen_k, Tiles::kTileN, shape.num_heads),
      Tiles::kThreads, sizeof(typename Tiles::SharedMemory), stream);
}

template void launch_max_logit<__nv_bfloat16>(const FwdParams&, void*);
template void launch_max_logit<__half>(const FwdParams&, void*);
template void launch_max_logit<float>(const FwdParams&, void*);

}  // namespace fa::support
