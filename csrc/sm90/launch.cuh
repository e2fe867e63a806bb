// SPDX-License-Identifier: BSD-3-Clause
// From a row of the kernel table to a launch on a stream, and the registration of both.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/check.h"
#include "common/dbias_tiles.h"
#include "common/key_tiles.h"
#include "common/math.h"
#include "dispatch/registry.h"
#include "sm90/bwd_general_kernel.cuh"
#include "sm90/bwd_kernel.cuh"
#include "sm90/bwd_wide_general_kernel.cuh"
#include "sm90/bwd_wide_kernel.cuh"
#include "sm90/dbias_kernel.cuh"
#include "sm90/fwd_general_kernel.cuh"
#include "sm90/fwd_kernel.cuh"
#include "sm90/tensor_map.h"
#include "support/bwd_preprocess.h"
#include "support/launch.cuh"
#include "support/pair_bits.h"
#include "support/resources.h"
#include "support/tile_map.h"
#include "support/work_counter.h"

namespace fa::sm90 {

// How TMA sees tensors of queries and of keys. Params: of a pass.
template <typename Params>
class TensorMaps {
 public:
  TensorMaps(const Params& params, Dtype dtype) : params_(params), dtype_(dtype) {}

  // cols: head_dim or head_dim_v.
  CUtensorMap of_queries(const TensorView& view, int cols, int box_rows) const {
    const Shape& shape = params_.shape;
    return make(view, params_.queries, shape.seqlen_q, shape.num_heads, cols, box_rows);
  }
  CUtensorMap of_keys(const TensorView& view, int cols, int box_rows) const {
    const Shape& shape = params_.shape;
    return make(view, params_.keys, shape.seqlen_k, shape.num_heads_kv, cols, box_rows);
  }

 private:
  CUtensorMap make(const TensorView& view, const Sequences& sequences, int seqlen, int heads,
                   int cols, int box_rows) const {
    const bool packed = sequences.cu_seqlens != nullptr;
    return make_tensor_map({.view = view,
                            .dtype = dtype_,
                            .batch = packed ? 1 : params_.shape.batch,
                            .heads = heads,
                            .rows = packed ? sequences.packed_rows : seqlen,
                            .cols = cols,
                            .box_rows = box_rows});
  }

  const Params& params_;
  Dtype dtype_;
};

// Whether TMA can bring a bias: one of the inputs' dtype, with rows of consecutive keys that begin
// at multiples of 16 bytes and do not overlap, which a tensor map is not said to describe.
inline bool tma_takes(const ScoreRules& rules, const Shape& shape, Dtype dtype) {
  constexpr int64_t kElements = 8;
  const ScoreTensor& bias = rules.bias;
  const auto takes = [&](int64_t stride) {
    return stride % kElements == 0 && stride >= max(shape.seqlen_k, 1);
  };
  return bias.data != nullptr && rules.bias_dtype == dtype && bias.key_stride == 1 &&
         reinterpret_cast<uintptr_t>(bias.data) % 16 == 0 && takes(bias.query_stride) &&
         (bias.head_stride == 0 || takes(bias.head_stride)) &&
         (bias.batch_stride == 0 || takes(bias.batch_stride));
}

// In boxes of so many queries; of nothing where TMA does not take it.
inline CUtensorMap make_bias_map(const ScoreRules& rules, const Shape& shape, Dtype dtype,
                                 int box_rows) {
  const ScoreTensor& bias = rules.bias;
  const bool takes = tma_takes(rules, shape, dtype);
  return make_tensor_map(
      {.view = {bias.data, bias.batch_stride, bias.query_stride, bias.head_stride},
       .dtype = dtype,
       .batch = takes && bias.batch_stride != 0 ? shape.batch : 1,
       .heads = takes && bias.head_stride != 0 ? shape.num_heads : 1,
       .rows = takes ? shape.seqlen_q : 0,
       .cols = takes ? shape.seqlen_k : 0,
       .box_rows = box_rows});
}

// For tiles of `tile_rows` rows each of what is called `name`. A block's first item is its own,
// unless items begin in_order; the counter, where there are more items than blocks, gives out the
// others.
template <typename Params>
Schedule make_schedule(const Params& params, const char* name, const TileScheduler& tiles,
                       int tile_rows, bool in_order, void* stream) {
  const int most_blocks = support::multiprocessors();
  const int64_t most_items = int64_t{UINT32_MAX} - most_blocks;
  const int64_t items = tiles.count();
  check(items <= most_items, ErrorKind::kNotImplemented, name, ": expected at most ", most_items,
        " tiles of ", tile_rows, " rows in all heads and batch entries, got ", items);
  return {.tiles = tiles,
          .items = static_cast<uint32_t>(items),
          .head_group = in_order ? head_group_in_order(params, tiles)
                                 : head_group(params, tiles, most_blocks),
          .counter = in_order || items > most_blocks ? support::work_counter(stream) : nullptr,
          .in_order = in_order};
}

template <typename Traits>
FwdTensorMaps make_forward_maps(const FwdParams& params) {
  const Shape& shape = params.shape;
  const TensorMaps maps(params, Traits::kConfig.dtype);
  return {.q = maps.of_queries(params.q, shape.head_dim, device::kWarpgroupRows),
          .k = maps.of_keys(params.k, shape.head_dim, Traits::kTileN),
          .v = maps.of_keys(params.v, shape.head_dim_v, Traits::kTileN),
          .out = maps.of_queries(params.out, shape.head_dim_v, device::kWarpgroupRows)};
}

template <typename Traits>
Schedule make_forward_schedule(const FwdParams& params, void* stream) {
  const Shape& shape = params.shape;
  return make_schedule(params, "q",
                       support::schedule(params.queries, shape.batch, shape.seqlen_q,
                                         Traits::kTileM, shape.num_heads),
                       Traits::kTileM, false, stream);
}

// The kernel of the plain rows and that of the general ones. What may fail, schedules and tensor
// maps, comes before the first launch here as in the backward pass, so that no work is half done.
template <int kRow>
void launch_attention(FwdTraits<kRow>*, const FwdParams& params, void* stream) {
  using Traits = FwdTraits<kRow>;
  const Schedule schedule = make_forward_schedule<Traits>(params, stream);
  support::launch_persistent<flash_fwd_sm90<Traits>>(
      "flash_fwd_sm90", schedule.tiles.count(), Traits::kThreads,
      sizeof(typename Traits::SharedMemory), stream, params, make_forward_maps<Traits>(params),
      schedule);
}
template <int kRow>
void launch_attention(GeneralFwdTraits<kRow>*, const FwdParams& params, void* stream) {
  using Traits = GeneralFwdTraits<kRow>;
  const Schedule schedule = make_forward_schedule<Traits>(params, stream);
  const GeneralFwdTensorMaps maps = {
      make_forward_maps<Traits>(params),
      make_bias_map(params.rules, params.shape, Traits::kConfig.dtype, device::kWarpgroupRows),
      tma_takes(params.rules, params.shape, Traits::kConfig.dtype)};
  support::fill_pair_bits(params, Traits::kTileM, Traits::kTileN, support::BitRows::kQueries,
                          stream);
  support::fill_tile_map(params, Traits::kTileM, Traits::kTileN, stream);
  support::launch_persistent<flash_fwd_general_sm90<Traits>>(
      "flash_fwd_general_sm90", schedule.tiles.count(), Traits::kThreads,
      sizeof(typename Traits::SharedMemory), stream, params, maps, schedule);
}

template <int kRow>
KernelResources attention_resources(FwdTraits<kRow>*) {
  using Traits = FwdTraits<kRow>;
  return support::resources_of(flash_fwd_sm90<Traits>, sizeof(typename Traits::SharedMemory));
}
template <int kRow>
KernelResources attention_resources(GeneralFwdTraits<kRow>*) {
  using Traits = GeneralFwdTraits<kRow>;
  return support::resources_of(flash_fwd_general_sm90<Traits>,
                               sizeof(typename Traits::SharedMemory));
}

template <typename Traits>
void launch_forward(const FwdParams& params, const LaunchContext& context) {
  launch_attention(static_cast<Traits*>(nullptr), params, context.stream);
}

template <typename Traits>
constexpr int64_t kDqSmemBytes = sizeof(typename Traits::DqTile);

template <typename Traits>
BwdTensorMaps make_narrow_maps(const BwdParams& params) {
  const Shape& shape = params.shape;
  const TensorMaps maps(params, Traits::kConfig.dtype);
  return {.q = maps.of_queries(params.q, shape.head_dim, Traits::kTileM),
          .k = maps.of_keys(params.k, shape.head_dim, Traits::kTileN),
          .v = maps.of_keys(params.v, shape.head_dim_v, Traits::kTileN),
          .dout = maps.of_queries(params.dout, shape.head_dim_v, Traits::kTileM),
          .dk = maps.of_keys(params.dk, shape.head_dim, device::kWarpgroupRows),
          .dv = maps.of_keys(params.dv, shape.head_dim_v, device::kWarpgroupRows)};
}

template <typename Traits>
WideBwdTensorMaps make_wide_maps(const BwdParams& params) {
  const Shape& shape = params.shape;
  const TensorMaps maps(params, Traits::kConfig.dtype);
  return {.q = maps.of_queries(params.q, shape.head_dim, Traits::kTileM),
          .k = maps.of_keys(params.k, shape.head_dim, Traits::kTileN),
          .v = maps.of_keys(params.v, shape.head_dim_v, Traits::kTileN),
          .dout = maps.of_queries(params.dout, shape.head_dim_v, Traits::kTileM)};
}

// The work of the gradient of a bias; none where nobody asks for it.
struct DbiasWork {
  DbiasTiles tiles;
  Schedule schedule;
};

template <typename Traits>
DbiasWork make_dbias_work(const BwdParams& params, void* stream) {
  if (params.dbias.data == nullptr) {
    return {};
  }
  const Shape& shape = params.shape;
  const DbiasTiles tiles = DbiasTiles::of(shape, params.dbias, Traits::kQueries, Traits::kTileN,
                                          support::multiprocessors());
  return {tiles, make_schedule(params, "attn_bias", tiles.schedule(shape, params.dbias),
                               tiles.strip * Traits::kQueries, false, stream)};
}

// Waits for the kernel before it as the main one does, which then waits for this one.
template <typename Traits>
void launch_bias_gradient(const BwdParams& params, const GeneralBwdTensorMaps& maps,
                          const DbiasWork& work, void* stream) {
  support::launch_persistent<flash_dbias_sm90<Traits>, support::Begin::kBesidePrevious>(
      "flash_dbias_sm90", work.schedule.tiles.count(), Traits::kThreads,
      sizeof(typename Traits::SharedMemory), stream, params, maps, work.tiles, work.schedule);
}

// How to launch the main kernel of the narrow rows, plain and general, and that of the wide ones.
template <int kRow>
auto prepare_gradients(BwdTraits<kRow>*, const BwdParams& params, const Schedule& schedule,
                       void* stream) {
  using Traits = BwdTraits<kRow>;
  return [=, &params, maps = make_narrow_maps<Traits>(params)] {
    support::launch_persistent<flash_bwd_sm90<Traits>, support::Begin::kBesidePrevious>(
        "flash_bwd_sm90", schedule.tiles.count(), Traits::kThreads,
        sizeof(typename Traits::SharedMemory), stream, params, maps, schedule);
  };
}
template <int kRow>
auto prepare_gradients(GeneralBwdTraits<kRow>*, const BwdParams& params, const Schedule& schedule,
                       void* stream) {
  using Traits = GeneralBwdTraits<kRow>;
  const GeneralBwdTensorMaps maps = {
      make_narrow_maps<Traits>(params),
      make_bias_map(params.rules, params.shape, Traits::kConfig.dtype, Traits::kTileM),
      tma_takes(params.rules, params.shape, Traits::kConfig.dtype)};
  using Dbias = DbiasTraits<kRow>;
  return [=, &params, work = make_dbias_work<Dbias>(params, stream)] {
    launch_bias_gradient<Dbias>(params, maps, work, stream);
    support::launch_persistent<flash_bwd_general_sm90<Traits>, support::Begin::kBesidePrevious>(
        "flash_bwd_general_sm90", schedule.tiles.count(), Traits::kThreads,
        sizeof(typename Traits::SharedMemory), stream, params, maps, schedule);
  };
}
template <int kRow>
auto prepare_gradients(WideBwdTraits<kRow>*, const BwdParams& params, const Schedule& schedule,
                       void* stream) {
  using Traits = WideBwdTraits<kRow>;
  return [=, &params, maps = make_wide_maps<Traits>(params)] {
    support::launch_persistent<flash_bwd_wide_sm90<Traits>, support::Begin::kBesidePrevious>(
        "flash_bwd_wide_sm90", schedule.tiles.count(), Traits::kThreads,
        sizeof(typename Traits::SharedMemory), stream, params, maps, schedule);
  };
}
template <int kRow>
auto prepare_gradients(WideGeneralBwdTraits<kRow>*, const BwdParams& params,
                       const Schedule& schedule, void* stream) {
  using Traits = WideGeneralBwdTraits<kRow>;
  const WideBwdTensorMaps tiles = make_wide_maps<Traits>(params);
  const GeneralBwdTensorMaps maps = {
      {.q = tiles.q, .k = tiles.k, .v = tiles.v, .dout = tiles.dout},
      make_bias_map(params.rules, params.shape, Traits::kConfig.dtype, Traits::kTileM),
      tma_takes(params.rules, params.shape, Traits::kConfig.dtype)};
  using Dbias = DbiasTraits<kRow>;
  return [=, &params, work = make_dbias_work<Dbias>(params, stream)] {
    launch_bias_gradient<Dbias>(params, maps, work, stream);
    if (params.dbias.data != nullptr) {
      // From here on as the main kernel has its scores, which are not transposed.
      support::fill_pair_bits(params, Traits::kTileM, Traits::kTileN, support::BitRows::kQueries,
                              stream);
    }
    support::launch_persistent<flash_bwd_wide_general_sm90<Traits>,
                               support::Begin::kBesidePrevious>(
        "flash_bwd_wide_general_sm90", schedule.tiles.count(), Traits::kThreads,
        sizeof(typename Traits::SharedMemory), stream, params, maps, schedule);
  };
}

template <int kRow>
KernelResources gradients_resources(BwdTraits<kRow>*) {
  using Traits = BwdTraits<kRow>;
  return support::resources_of(flash_bwd_sm90<Traits>, sizeof(typename Traits::SharedMemory));
}
template <int kRow>
KernelResources gradients_resources(GeneralBwdTraits<kRow>*) {
  using Traits = GeneralBwdTraits<kRow>;
  using Dbias = DbiasTraits<kRow>;
  return support::larger(
      support::resources_of(flash_bwd_general_sm90<Traits>, sizeof(typename Traits::SharedMemory)),
      support::resources_of(flash_dbias_sm90<Dbias>, sizeof(typename Dbias::SharedMemory)));
}
template <int kRow>
KernelResources gradients_resources(WideBwdTraits<kRow>*) {
  using Traits = WideBwdTraits<kRow>;
  return support::resources_of(flash_bwd_wide_sm90<Traits>, sizeof(typename Traits::SharedMemory));
}
template <int kRow>
KernelResources gradients_resources(WideGeneralBwdTraits<kRow>*) {
  using Traits = WideGeneralBwdTraits<kRow>;
  using Dbias = DbiasTraits<kRow>;
  return support::larger(
      support::resources_of(flash_bwd_wide_general_sm90<Traits>,
                            sizeof(typename Traits::SharedMemory)),
      support::resources_of(flash_dbias_sm90<Dbias>, sizeof(typename Dbias::SharedMemory)));
}

template <typename Traits>
void launch_backward(const BwdParams& params, const LaunchContext& context) {
  const Shape& shape = params.shape;
  const TileScheduler query_tiles = support::schedule(params.queries, shape.batch, shape.seqlen_q,
                                                      Traits::kTileM, shape.num_heads);
  const Schedule schedule = make_schedule(
      params, "k",
      support::schedule(params.keys, shape.batch, shape.seqlen_k, Traits::kTileN,
                        shape.num_heads_kv),
      Traits::kTileN, params.workspace.turns != nullptr && query_tiles.count() > 0, context.stream);
  const auto launch_gradients =
      prepare_gradients(static_cast<Traits*>(nullptr), params, schedule, context.stream);
  // The main kernel waits for the one before it alone, which begins when bits and map are there.
  // The gradient of a bias comes first, if any, and its scores are transposed in all rows.
  const bool are_transposed = Traits::kTransposesScores || params.dbias.data != nullptr;
  support::fill_pair_bits(params, Traits::kTileM, Traits::kTileN,
                          are_transposed ? support::BitRows::kKeys : support::BitRows::kQueries,
                          context.stream);
  support::fill_tile_map(params, Traits::kTileM, Traits::kTileN, context.stream);
  support::launch_bwd_preprocess<typename Traits::Element>(params, context.stream);
  launch_gradients();
  support::launch<flash_bwd_dq_sm90<Traits>, support::Begin::kBesidePrevious>(
      "flash_bwd_dq_sm90", params, query_tiles, Traits::kDqThreads, kDqSmemBytes<Traits>,
      context.stream);
}

template <typename Traits>
KernelResources forward_resources() {
  return attention_resources(static_cast<Traits*>(nullptr));
}

template <typename Traits>
KernelResources backward_resources() {
  return support::larger(gradients_resources(static_cast<Traits*>(nullptr)),
                         support::resources_of(flash_bwd_dq_sm90<Traits>, kDqSmemBytes<Traits>));
}

// Registers every row of the table with this pass and head_dim when the library is loaded.
template <Pass kPass, int kHeadDim>
struct Registration {
  Registration() { for_each_row<Family::kSm90, kPass, kHeadDim>(*this); }

  template <int kRow>
  void operator()() const {
    RegisteredKernel& kernel = registry().kernels[kRow];
    if constexpr (kPass == Pass::kForward) {
      using Traits = std::conditional_t<table::kRows[kRow].score == ScoreMode::kGeneral,
                                        GeneralFwdTraits<kRow>, FwdTraits<kRow>>;
      kernel.forward = launch_forward<Traits>;
      kernel.resources = forward_resources<Traits>;
    } else {
      constexpr bool kIsGeneral = table::kRows[kRow].score == ScoreMode::kGeneral;
      using NarrowTraits = std::conditional_t<kIsGeneral, GeneralBwdTraits<kRow>, BwdTraits<kRow>>;
      using WideTraits =
          std::conditional_t<kIsGeneral, WideGeneralBwdTraits<kRow>, WideBwdTraits<kRow>>;
      using Traits = std::conditional_t<table::kRows[kRow].is_wide(), WideTraits, NarrowTraits>;
      kernel.backward = launch_backward<Traits>;
      kernel.resources = backward_resources<Traits>;
    }
  }
};

}  // namespace fa::sm90
