// SPDX-License-Identifier: BSD-3-Clause
// A general backward row of the kernel table whose dk and dv are too wide for one warpgroup, as
// types and constants. Included by CUDA sources only.
#pragma once

#include "common/tile_map.h"
#include "common/told_tile.h"
#include "sm90/bwd_general_work.cuh"
#include "sm90/bwd_wide_traits.h"

namespace fa::sm90 {

template <int kRow>
struct WideGeneralBwdTraits : WideRowTraits<kRow> {
  using Base = WideRowTraits<kRow>;
  using Tile = typename Base::template Rows<Base::kTileM>;
  using Keys = typename Base::template Rows<Base::kTileN>;
  using ScoreTile = typename Base::ScoreTile;
  using Work = GeneralBwdWork<Base::kTileM, Base::kTileN>;
  static constexpr bool kHasSoftcap = Base::kConfig.has_softcap();
  static constexpr bool kHasRoomForBits = true;  // beside a bias
  static constexpr bool kHoldsPlace = false;     // of what is loaded: those who load have too few
                                                 // registers
  static constexpr int kWordsOfBits = Base::kTileM * Base::kTileN / PairBits::kBitsOfWord;
  // A tile lies in one block of a block mask.
  static_assert(128 % Base::kTileM == 0 && 128 % Base::kTileN == 0);

  // A multiprocessor has 65536 registers, 128 for each thread. Those who load walk a map.
  static constexpr int kProducerRegisters = 32;
  static constexpr int kScoreRegisters = 160;
  static constexpr int kGradientRegisters = 160;
  static_assert(kProducerRegisters + kScoreRegisters + 2 * kGradientRegisters <= 512);

  // Whether some query sees some of the keys is not known when they are loaded.
  static FA_DEVICE bool needs_keys(const BwdWork&) { return true; }

  // Half of a warp's scores, of a bias that TMA does not bring.
  using BiasHalf = device::Accumulator<device::kBlockRows, Base::kTileN / 2>;
  static constexpr int kFloatsOfBiasHalf = BiasHalf::kRows * BiasHalf::kCols;  // of a warp

  // wgmma and TMA take the swizzle from the address: tiles begin at multiples of 1024.
  struct alignas(1024) SharedMemory {
    Keys k;
    Keys v;
    Tile q[kBwdStages];
    Tile dout[kBwdStages];
    ScoreTile p[kBwdStages];  // before it, the bias
    ScoreTile ds[kBwdStages];
    uint32_t bits[kBwdStages][kWordsOfBits];  // of a mask (PairBits)
    typename Base::Statistics statistics[kBwdStages];
    device::Ring<kWorkStages> work_ring;
    device::Ring<kWorkStages> visible_ring;  // whether it has visible tiles
    device::Ring<1> may_take;                // the next item
    device::Ring<1> k_ring;
    device::Ring<1> v_ring;
    device::Ring<kBwdStages> q_ring;  // and statistics, bits, bias and what is told of the tile
    device::Ring<kBwdStages> dout_ring;
    device::Ring<kBwdStages> p_ring;
    device::Ring<kBwdStages> ds_ring;
    device::Ring<kBwdStages> turn_ring;   // to add to dq
    device::Ring<kBwdStages> added_ring;  // to dq
    device::Ring<1> landings[2];          // of the two warps that load
    ToldTile told[kBwdStages];
    Work work[kWorkStages];

    // For what comes with a tile of queries, until q_ring is filled: the bias comes to where p will
    // be, and those who sum dv read what is told. They release first p and then dout.
    FA_DEVICE void wait_for_room(const device::RingPosition<kBwdStages>& at) {
      at.wait_empty(q_ring);
      at.wait_empty(dout_ring);
    }
    FA_DEVICE ScoreTile& bias_tile(int stage) { return p[stage]; }
    FA_DEVICE uint32_t* bits_of(int stage) { return bits[stage]; }
    // In place of p, and of ds for the second half of the keys: this lane's floats of a bias that
    // TMA does not bring, each a warp's width from the next.
    FA_DEVICE float* bias_of_lane(int stage, int half) {
      auto& s_tile = half == 0 ? p[stage] : ds[stage];
      return reinterpret_cast<float*>(s_tile.elements) +
             ptx::warp_index() % Base::kWarpgroupWarps * kFloatsOfBiasHalf + ptx::lane_index();
    }
  };
  static_assert(sizeof(ScoreTile) == Base::kWarpgroupWarps * kFloatsOfBiasHalf * sizeof(float));
  static_assert(sizeof(SharedMemory) == Base::kConfig.sm90_bwd_smem_bytes(2, 4) +
                                            kBwdStages * kWordsOfBits * sizeof(uint32_t));
};

}  // namespace fa::sm90
