// SPDX-License-Identifier: BSD-3-Clause
// A row of the kernel table as types and constants. Included by CUDA sources only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "device/pipeline.cuh"
#include "device/smem.cuh"
#include "device/warpgroup_mma.cuh"
#include "dispatch/kernel_table.h"
#include "sm90/fwd_work.cuh"
#include "sm90/give_out_work.cuh"

namespace fa::sm90 {

template <int kRow>
struct FwdTraits {
  static constexpr KernelConfig kConfig = table::kRows[kRow];
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kTileM = kConfig.tile_m;
  static constexpr int kTileN = kConfig.tile_n;
  static constexpr int kThreads = kConfig.threads();
  static constexpr int kQStages = kConfig.q_stages();
  static constexpr int kKvStages = kConfig.kv_stages();

  // One warpgroup loads, the others compute, 64 rows of queries each.
  static constexpr int kMathWarpgroups = kThreads / device::kWarpgroupThreads - 1;
  static constexpr int kMathWarps = 4 * kMathWarpgroups;
  static constexpr int kMathThreads = kMathWarpgroups * device::kWarpgroupThreads;
  static_assert(kTileM == kMathWarpgroups * device::kWarpgroupRows);
  // A multiprocessor has 65536 registers; the producer leaves most of its own to the others.
  static constexpr int kProducerRegisters = kMathWarpgroups == 3 ? 32 : 40;
  static constexpr int kMathRegisters = kMathWarpgroups == 3 ? 160 : 232;

  // Whether the registers suffice to compute p while the product of the previous p runs.
  static constexpr bool kOverlapsSoftmax = kMathWarpgroups == 2;
  // And whether ptxas has registers to do so for two tiles in turn, which saves copying p.
  static constexpr bool kAlternates = kOverlapsSoftmax && kHeadDim <= 128;

  static_assert(kConfig.dtype == Dtype::kBFloat16 || kConfig.dtype == Dtype::kFloat16);
  using Element = std::conditional_t<kConfig.dtype == Dtype::kBFloat16, __nv_bfloat16, __half>;

  template <int kRows>
  using Rows = device::SmemTile<Element, kRows, kConfig.smem_cols()>;

  using Scores = device::Accumulator<device::kBlockRows, kTileN>;
  using Out = device::Accumulator<device::kBlockRows, kHeadDim>;
  using Probabilities = device::OperandA<Element, device::kBlockRows, kTileN>;

  // Of its last tile of keys a warpgroup takes the first columns alone where it sees no more: they
  // save products where these are the limit, but not where the softmax is.
  static constexpr bool kTrims = kHeadDim > 128;
  static constexpr int kTrimmedCols = kTileN == 80 ? 48 : 64;
  using TrimmedProbabilities = device::OperandA<Element, device::kBlockRows, kTrimmedCols>;

  // The way of out to global memory leads through the shared memory of its queries where the next
  // have a second stage, and else through that of values.
  static constexpr bool kStoresThroughQueries = kQStages == 2;
  using OutTile = device::SmemTile<Element, device::kWarpgroupRows, kConfig.smem_cols()>;
  static_assert(kStoresThroughQueries ||
                (kMathWarpgroups == 2 && sizeof(OutTile) <= sizeof(Rows<kTileN>)));

  // A math warpgroup skips the tiles of keys that the block sees and it does not, before it first
  // releases values, and after it has begun to hold some for its out: the warp that loads must not
  // come to wait for those.
  static_assert((kMathWarpgroups - 1) * device::kWarpgroupRows <=
                (kStoresThroughQueries ? 3 : 1) * kTileN);

  // wgmma and TMA take the swizzle from the address: tiles begin at multiples of 1024.
  struct alignas(1024) SharedMemory {
    Rows<kTileM> q[kQStages];
    Rows<kTileN> k[kKvStages];
    Rows<kTileN> v[kKvStages];
    device::Ring<kWorkStages> work_ring;
    device::Ring<1> may_take;  // the next item
    device::Ring<kQStages> q_ring[kMathWarpgroups];
    device::Ring<kKvStages> k_ring;
    device::Ring<kKvStages> v_ring;
    SharedFwdWork<kMathWarpgroups, kTileN> work[kWorkStages];

    // In place of a tile of values.
    static FA_DEVICE OutTile& out_in(Rows<kTileN>& s_values) {
      return reinterpret_cast<OutTile&>(s_values);
    }
  };
  static_assert(sizeof(Rows<kTileM>) % 1024 == 0 && sizeof(Rows<kTileN>) % 1024 == 0);
  static_assert(sizeof(SharedMemory) == kConfig.smem_bytes());
};

}  // namespace fa::sm90
