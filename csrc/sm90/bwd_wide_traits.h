// SPDX-License-Identifier: BSD-3-Clause
// A backward row of the kernel table whose dk and dv are too wide for one warpgroup, as types and
// constants. Included by CUDA sources only.
#pragma once

#include "sm90/bwd_traits.h"

namespace fa::sm90 {

// Of all rows whose dk and dv have a warpgroup each.
template <int kRow>
struct WideRowTraits {
  static constexpr KernelConfig kConfig = table::kRows[kRow];
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kTileM = kConfig.tile_m;
  static constexpr int kTileN = kConfig.tile_n;
  static constexpr int kThreads = kConfig.threads();

  // One warpgroup loads; of the others one has the scores and dq, one dv and one dk.
  static constexpr int kMathWarpgroups = 3;
  static constexpr int kWarpgroupWarps = device::kWarpgroupThreads / ptx::kWarpSize;
  static constexpr int kMathWarps = kMathWarpgroups * kWarpgroupWarps;
  static_assert(kThreads == (1 + kMathWarpgroups) * device::kWarpgroupThreads);
  static_assert(kTileM == device::kWarpgroupRows && kTileN == device::kWarpgroupRows);
  static_assert(kConfig.dtype == Dtype::kBFloat16 || kConfig.dtype == Dtype::kFloat16);
  using Element = std::conditional_t<kConfig.dtype == Dtype::kBFloat16, __nv_bfloat16, __half>;

  template <int kRows>
  using Rows = device::SmemTile<Element, kRows, kConfig.smem_cols()>;

  static constexpr bool kTransposesScores = false;
  using Scores = device::Accumulator<device::kBlockRows, kTileN>;  // (queries, keys)
  using ScoreTile = device::SmemTile<Element, kTileN, kTileM>;     // (keys, queries)
  using KeyGradient = device::Accumulator<device::kBlockRows, kHeadDim>;
  static constexpr int kColsAtOnce = kHeadDim > 192 ? kHeadDim / 2 : kHeadDim;

  // A tile of dq is computed in two shares of its columns.
  static constexpr int kDqCols = 128;
  static constexpr int kDqThreads = 2 * device::kWarpgroupThreads;  // to write it out
  using Dq = device::Accumulator<device::kBlockRows, kDqCols>;
  using DqTile = device::SmemTile<Element, kTileM, 2 * kDqCols>;
  using LastDq = device::Accumulator<device::kBlockRows, kHeadDim - kDqCols>;
  static_assert(kDqCols < kHeadDim && kHeadDim <= 2 * kDqCols);
  static FA_DEVICE int dq_row(int) { return 0; }
  static FA_DEVICE int dq_col(int share) { return share * kDqCols; }

  using Statistics = BwdStatistics<kTileM>;
  static_assert(sizeof(Rows<kTileM>) % 1024 == 0 && sizeof(ScoreTile) % 1024 == 0);
};

template <int kRow>
struct WideBwdTraits : WideRowTraits<kRow> {
  using Base = WideRowTraits<kRow>;
  using Tile = typename Base::template Rows<Base::kTileM>;
  using Keys = typename Base::template Rows<Base::kTileN>;
  using ScoreTile = typename Base::ScoreTile;

  // A multiprocessor has 65536 registers, 128 for each thread.
  static constexpr int kProducerRegisters = 32;
  static constexpr int kScoreRegisters = 160;
  static constexpr int kGradientRegisters = 160;
  static_assert(kProducerRegisters + kScoreRegisters + 2 * kGradientRegisters <= 512);

  // Whether some query may see some of the keys: else nobody waits for them.
  static FA_DEVICE bool needs_keys(const BwdWork& work) { return !work.seeing.empty(); }

  // wgmma and TMA take the swizzle from the address: tiles begin at multiples of 1024.
  struct alignas(1024) SharedMemory {
    Keys k;
    Keys v;
    Tile q[kBwdStages];
    Tile dout[kBwdStages];
    ScoreTile p[kBwdStages];
    ScoreTile ds[kBwdStages];
    typename Base::Statistics statistics[kBwdStages];
    device::Ring<kWorkStages> work_ring;
    device::Ring<1> may_take;  // the next item
    device::Ring<1> k_ring;
    device::Ring<1> v_ring;
    device::Ring<kBwdStages> q_ring;  // and statistics
    device::Ring<kBwdStages> dout_ring;
    device::Ring<kBwdStages> p_ring;
    device::Ring<kBwdStages> ds_ring;
    device::Ring<kBwdStages> turn_ring;   // to add to dq
    device::Ring<kBwdStages> added_ring;  // to dq
    device::Ring<1> landings[2];          // of the two warps that load
    SharedBwdWork<1> work[kWorkStages];
  };
  static_assert(sizeof(SharedMemory) == Base::kConfig.smem_bytes());
};

}  // namespace fa::sm90
