// SPDX-License-Identifier: BSD-3-Clause
// From a row of the kernel table to a launch on a stream, and the registration of both.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/key_tiles.h"
#include "common/math.h"
#include "dispatch/registry.h"
#include "sm90/fwd_kernel.cuh"
#include "sm90/tensor_map.h"
#include "support/launch.cuh"
#include "support/resources.h"
#include "support/work_counter.h"

namespace fa::sm90 {

template <typename Traits>
FwdTensorMaps tensor_maps(const FwdParams& params) {
  const Shape& shape = params.shape;
  const auto map = [&](const TensorView& view, const Sequences& sequences, int seqlen, int heads,
                       int box_rows) {
    const bool packed = sequences.cu_seqlens != nullptr;
    return make_tensor_map({.view = view,
                            .dtype = Traits::kConfig.dtype,
                            .batch = packed ? 1 : shape.batch,
                            .heads = heads,
                            .rows = packed ? sequences.packed_rows : seqlen,
                            .cols = shape.head_dim,
                            .box_rows = box_rows});
  };
  const auto queries = [&](const TensorView& view, int box_rows) {
    return map(view, params.queries, shape.seqlen_q, shape.num_heads, box_rows);
  };
  const auto keys = [&](const TensorView& view) {
    return map(view, params.keys, shape.seqlen_k, shape.num_heads_kv, Traits::kTileN);
  };
  return {queries(params.q, device::kWarpgroupRows), keys(params.k), keys(params.v),
          queries(params.out, device::kWarpgroupRows)};
}

// A block's first item is its own; the counter, where there are more items than blocks, gives out
// the others.
inline Schedule make_schedule(const FwdParams& params, int tile_m, void* stream) {
  const Shape& shape = params.shape;
  const TileScheduler tiles = {ceil_div(shape.seqlen_q, tile_m), shape.num_heads, shape.batch};
  const int most_blocks = support::multiprocessors();
  const int64_t most_items = int64_t{UINT32_MAX} - most_blocks;
  check(tiles.count() <= most_items, ErrorKind::kNotImplemented, "q: expected at most ", most_items,
        " tiles of ", tile_m, " queries in all heads and batch entries, got ", tiles.count());
  return {.tiles = tiles,
          .items = static_cast<uint32_t>(tiles.count()),
          .head_group = head_group(params, tiles.tiles, most_blocks),
          .counter = tiles.count() > most_blocks ? support::work_counter(stream) : nullptr};
}

template <typename Traits>
void launch_forward(const FwdParams& params, const LaunchContext& context) {
  const Schedule schedule = make_schedule(params, Traits::kTileM, context.stream);
  support::launch_persistent<flash_fwd_sm90<Traits>>(
      "flash_fwd_sm90", schedule.tiles.count(), Traits::kThreads,
      sizeof(typename Traits::SharedMemory), context.stream, params, tensor_maps<Traits>(params),
      schedule);
}

template <typename Traits>
KernelResources forward_resources() {
  return support::resources_of(flash_fwd_sm90<Traits>, sizeof(typename Traits::SharedMemory));
}

// Registers every row of the table with this pass and head_dim when the library is loaded.
template <Pass kPass, int kHeadDim>
struct Registration {
  Registration() { for_each_row<Family::kSm90, kPass, kHeadDim>(*this); }

  template <int kRow>
  void operator()() const {
    RegisteredKernel& kernel = registry().kernels[kRow];
    kernel.forward = launch_forward<FwdTraits<kRow>>;
    kernel.resources = forward_resources<FwdTraits<kRow>>;
  }
};

}  // namespace fa::sm90
