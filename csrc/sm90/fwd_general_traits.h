// SPDX-License-Identifier: BSD-3-Clause
// A general forward row of the kernel table as types and constants. Included by CUDA sources only.
#pragma once

#include <climits>

#include "sm90/fwd_general_work.cuh"
#include "sm90/kept_pairs.cuh"
#include "sm90/seen_pairs.cuh"
#include "sm90/traits.h"

namespace fa::sm90 {

// What the warp that loads keys tells of a tile. Where an item has none, that is its last.
struct KeyTile {
  int bits;

  static FA_DEVICE KeyTile none() { return {INT_MIN | 1}; }
  static FA_DEVICE KeyTile of(int tile, bool is_mixed, bool is_last) {
    return {tile * 4 + (is_mixed ? 2 : 0) + (is_last ? 1 : 0)};
  }
  FA_DEVICE bool exists() const { return bits >= 0; }
  FA_DEVICE int tile() const { return bits / 4; }
  FA_DEVICE bool is_mixed() const { return (bits & 2) != 0; }
  FA_DEVICE bool is_last() const { return (bits & 1) != 0; }
};

template <int kRow>
struct GeneralFwdTraits {
  static constexpr KernelConfig kConfig = table::kRows[kRow];
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kTileM = kConfig.tile_m;
  static constexpr int kTileN = kConfig.tile_n;
  static constexpr int kThreads = kConfig.threads();
  static constexpr int kQStages = kConfig.q_stages();
  static constexpr bool kHasSoftcap = kConfig.has_softcap();
  static constexpr int kKvStages = kConfig.kv_stages();

  // One warpgroup loads and finds out which pairs are seen, by a warp for each of the two others,
  // which compute, 64 rows of queries each.
  static constexpr int kMathWarpgroups = 2;
  static constexpr int kWarpgroupWarps = device::kWarpgroupThreads / ptx::kWarpSize;
  static constexpr int kMathWarps = kWarpgroupWarps * kMathWarpgroups;
  static_assert(kThreads == (1 + kMathWarpgroups) * device::kWarpgroupThreads);
  static_assert(kTileM == kMathWarpgroups * device::kWarpgroupRows);
  static_assert(128 % kTileM == 0 && 128 % kTileN == 0);  // a tile lies in one block of a mask
  // A multiprocessor has 65536 registers; the producer leaves most of its own to the others.
  static constexpr int kProducerRegisters = kHeadDim > 128 ? 56 : 72;
  static constexpr int kMathRegisters = kHeadDim > 128 ? 224 : 216;

  // Whether there are registers for a second p while the product of the first one runs; else the
  // rules alone are applied under it.
  static constexpr bool kOverlapsSoftmax = kHeadDim != 128;

  static_assert(kConfig.dtype == Dtype::kBFloat16 || kConfig.dtype == Dtype::kFloat16);
  using Element = std::conditional_t<kConfig.dtype == Dtype::kBFloat16, __nv_bfloat16, __half>;

  template <int kRows>
  using Rows = device::SmemTile<Element, kRows, kConfig.smem_cols()>;
  using Bias = device::SmemTile<Element, device::kWarpgroupRows, kTileN>;

  using Scores = device::Accumulator<device::kBlockRows, kTileN>;
  using Out = device::Accumulator<device::kBlockRows, kHeadDim>;
  using Probabilities = device::OperandA<Element, device::kBlockRows, kTileN>;
  using Kept = KeptPairs<kTileN, false>;

  // wgmma and TMA take the swizzle from the address: tiles begin at multiples of 1024.
  struct alignas(1024) SharedMemory {
    Rows<kTileM> q[kQStages];
    Rows<kTileN> k[kKvStages];
    Rows<kTileN> v[kKvStages];
    Bias bias[kMathWarpgroups];
    SeenPairs<kTileN> seen[kMathWarpgroups];
    device::Ring<kWorkStages> work_ring;
    device::Ring<1> may_take;  // the next item
    device::Ring<kQStages> q_ring[kMathWarpgroups];
    device::Ring<kKvStages> k_ring;
    device::Ring<kKvStages> v_ring;
    device::Ring<1> bias_ring[kMathWarpgroups];
    device::Ring<1> seen_ring[kMathWarpgroups];  // of mixed tiles alone
    KeyTile key_tiles[kKvStages];                // of the stages of keys
    GeneralFwdWork work[kWorkStages];

    // In place of 16 rows of a bias, half as many floats: the first of this lane.
    static FA_DEVICE float* floats_in(Bias& s_bias, int row) {
      return reinterpret_cast<float*>(s_bias.elements) + row * (kTileN / 2) + ptx::lane_index();
    }
  };
  static_assert(sizeof(Rows<kTileM>) % 1024 == 0 && sizeof(Rows<kTileN>) % 1024 == 0);
  static_assert(sizeof(Bias) % 1024 == 0);
  static_assert(sizeof(SharedMemory) == kConfig.smem_bytes());
};

}  // namespace fa::sm90
