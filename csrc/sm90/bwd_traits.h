// SPDX-License-Identifier: BSD-3-Clause
// A backward row of the kernel table as types and constants. Included by CUDA sources only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "device/pipeline.cuh"
#include "device/smem.cuh"
#include "device/warpgroup_mma.cuh"
#include "dispatch/kernel_table.h"
#include "sm90/bwd_work.cuh"
#include "sm90/give_out_work.cuh"

namespace fa::sm90 {

// Of what passes by, one tile comes while another is used.
inline constexpr int kBwdStages = 2;

// Of a tile of queries, as support/bwd_preprocess.h leaves them in global memory.
template <int kTileM>
struct BwdStatistics {
  alignas(16) float lse_log2[kTileM];
  alignas(16) float delta[kTileM];
};

// Of all rows whose dk and dv fit the registers of those who have the scores.
template <int kRow>
struct NarrowBwdTraits {
  static constexpr KernelConfig kConfig = table::kRows[kRow];
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kTileM = kConfig.tile_m;
  static constexpr int kTileN = kConfig.tile_n;
  static constexpr int kThreads = kConfig.threads();

  // One warpgroup loads, the others compute, for 64 keys each.
  static constexpr int kMathWarpgroups = kThreads / device::kWarpgroupThreads - 1;
  static constexpr int kMathWarps = 4 * kMathWarpgroups;
  static constexpr int kMathThreads = kMathWarpgroups * device::kWarpgroupThreads;
  static_assert(kMathWarpgroups == 2 && kTileN == kMathWarpgroups * device::kWarpgroupRows);
  // A multiprocessor has 65536 registers; the producer leaves most of its own to the others.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kMathRegisters = 232;

  static_assert(kConfig.dtype == Dtype::kBFloat16 || kConfig.dtype == Dtype::kFloat16);
  using Element = std::conditional_t<kConfig.dtype == Dtype::kBFloat16, __nv_bfloat16, __half>;

  template <int kRows>
  using Rows = device::SmemTile<Element, kRows, kConfig.smem_cols()>;

  // Of a warpgroup, (keys, queries) and (keys, columns).
  static constexpr bool kTransposesScores = true;
  using Scores = device::Accumulator<device::kBlockRows, kTileM>;
  using KeyGradient = device::Accumulator<device::kBlockRows, kHeadDim>;
  // Those of the rows are loaded under the products, if registers are left for them.
  static constexpr bool kLoadsStatisticsAhead = kTileM == device::kWarpgroupRows;

  // A warpgroup's share of a tile of dq: half of its rows where it has 128, else of its columns.
  static constexpr int kDqCols = 64;
  static constexpr int kDqThreads = kMathThreads;  // to write it out
  using Dq = device::Accumulator<device::kBlockRows, kDqCols>;
  using DqTile = Rows<kTileM>;  // of all shares
  static constexpr bool kSharesRowsOfDq = kTileM == 2 * device::kWarpgroupRows;
  static_assert(kSharesRowsOfDq ? kHeadDim == kDqCols
                                : kTileM == device::kWarpgroupRows && kHeadDim > kDqCols &&
                                      kHeadDim <= 2 * kDqCols);
  static FA_DEVICE int dq_row(int warpgroup) {
    return kSharesRowsOfDq ? warpgroup * device::kWarpgroupRows : 0;
  }
  static FA_DEVICE int dq_col(int warpgroup) { return kSharesRowsOfDq ? 0 : warpgroup * kDqCols; }

  using Statistics = BwdStatistics<kTileM>;
  using ScoreTile = device::SmemTile<Element, kTileM, kTileN>;  // (queries, keys)
  struct Keys {
    Rows<kTileN> k;
    Rows<kTileN> v;
  };
  static_assert(sizeof(Keys) % 1024 == 0 && sizeof(Rows<kTileM>) % 1024 == 0);
};

template <int kRow>
struct BwdTraits : NarrowBwdTraits<kRow> {
  using Base = NarrowBwdTraits<kRow>;
  using Tile = typename Base::template Rows<Base::kTileM>;
  static constexpr int kKeyStages = 2;

  // wgmma and TMA take the swizzle from the address: tiles begin at multiples of 1024.
  struct alignas(1024) SharedMemory {
    typename Base::Keys keys[kKeyStages];
    Tile q[kBwdStages];
    Tile dout[kBwdStages];
    typename Base::ScoreTile ds[kBwdStages];
    typename Base::Statistics statistics[kBwdStages];
    device::Ring<kWorkStages> work_ring;
    device::Ring<1> may_take;  // the next item
    device::Ring<kKeyStages> keys_ring;
    device::Ring<kBwdStages> q_ring;  // and statistics
    device::Ring<kBwdStages> dout_ring;
    device::Ring<kBwdStages> ds_ring;
    device::Ring<kBwdStages> turn_ring;   // to add to dq
    device::Ring<kBwdStages> added_ring;  // to dq
    device::Ring<1> landings[2];          // of the two warps that load
    SharedBwdWork<Base::kMathWarpgroups> work[kWorkStages];
  };
  static_assert(sizeof(SharedMemory) == Base::kConfig.smem_bytes());
};

}  // namespace fa::sm90
