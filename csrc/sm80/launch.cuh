// SPDX-License-Identifier: BSD-3-Clause
// From a row of the kernel table to launches on a stream, and the registration of both.
#pragma once

#include "common/math.h"
#include "dispatch/registry.h"
#include "sm80/bwd_kernel.cuh"
#include "sm80/dbias_kernel.cuh"
#include "sm80/fwd_kernel.cuh"
#include "support/bwd_preprocess.h"
#include "support/dsinks.h"
#include "support/dslopes.h"
#include "support/launch.cuh"
#include "support/max_logit.h"
#include "support/resources.h"
#include "support/tile_map.h"

namespace fa::sm80 {

// Of the tensors, where Traits::Element is of products.
template <typename Traits>
using TensorElement = typename ElementOf<tensor_dtype(Traits::kConfig.dtype)>::type;

template <typename Traits>
void launch_forward(const FwdParams& params, const LaunchContext& context) {
  const Shape& shape = params.shape;
  support::fill_tile_map(params, Traits::kTileM, Traits::kTileN, context.stream);
  support::launch<flash_fwd_sm80<Traits>>(
      "flash_fwd_sm80", params,
      support::schedule(params.queries, shape.batch, shape.seqlen_q, Traits::kTileM,
                        shape.num_heads),
      Traits::kThreads, sizeof(typename Traits::SharedMemory), context.stream);
  if constexpr (Traits::kGeneral) {
    support::launch_max_logit<TensorElement<Traits>>(params, context.stream);
  }
}

template <typename Traits>
constexpr int64_t kDqSmemBytes = sizeof(typename Traits::template Rows<Traits::kTileM>);

template <typename Traits>
void launch_backward(const BwdParams& given, const LaunchContext& context) {
  BwdParams params = given;
  const Shape& shape = params.shape;
  if (shape.seqlen_q == 0) {
    params.workspace.turns = nullptr;  // nothing to add, and no block to begin the count
  }
  support::fill_tile_map(params, Traits::kTileM, Traits::kTileN, context.stream);
  support::launch_bwd_preprocess<TensorElement<Traits>>(params, context.stream);
  if constexpr (Traits::kGeneral) {
    if (params.dbias.data != nullptr) {
      support::launch<flash_dbias_sm80<Traits>>(
          "flash_dbias_sm80", params, dbias_schedule<Traits>(params), Traits::kThreads,
          sizeof(typename Traits::SharedMemory), context.stream);
    }
    support::launch_dslopes<TensorElement<Traits>>(params, context.stream);
    support::launch_dsinks(params, context.stream);
  }
  support::launch<flash_bwd_sm80<Traits>>(
      "flash_bwd_sm80", params,
      support::schedule(params.keys, shape.batch, shape.seqlen_k, Traits::kTileN,
                        shape.num_heads_kv),
      Traits::kThreads, sizeof(typename Traits::SharedMemory), context.stream);
  support::launch<flash_bwd_dq_sm80<Traits>>(
      "flash_bwd_dq_sm80", params,
      support::schedule(params.queries, shape.batch, shape.seqlen_q, Traits::kTileM,
                        shape.num_heads),
      Traits::kThreads, kDqSmemBytes<Traits>, context.stream);
}

template <typename Traits>
KernelResources forward_resources() {
  return support::resources_of(flash_fwd_sm80<Traits>, sizeof(typename Traits::SharedMemory));
}

template <typename Traits>
KernelResources backward_resources() {
  constexpr int64_t kSmemBytes = sizeof(typename Traits::SharedMemory);
  const KernelResources resources =
      support::larger(support::resources_of(flash_bwd_sm80<Traits>, kSmemBytes),
                      support::resources_of(flash_bwd_dq_sm80<Traits>, kDqSmemBytes<Traits>));
  if constexpr (Traits::kGeneral) {
    return support::larger(resources, support::resources_of(flash_dbias_sm80<Traits>, kSmemBytes));
  }
  return resources;
}

// Registers every row of the table with this pass and head_dim when the library is loaded.
template <Pass kPass, int kHeadDim>
struct Registration {
  Registration() { for_each_row<Family::kSm80, kPass, kHeadDim>(*this); }

  template <int kRow>
  void operator()() const {
    RegisteredKernel& kernel = registry().kernels[kRow];
    if constexpr (kPass == Pass::kForward) {
      kernel.forward = launch_forward<FwdTraits<kRow>>;
      kernel.resources = forward_resources<FwdTraits<kRow>>;
    } else {
      kernel.backward = launch_backward<BwdTraits<kRow>>;
      kernel.resources = backward_resources<BwdTraits<kRow>>;
    }
  }
};

}  // namespace fa::sm80
