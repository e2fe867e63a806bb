// SPDX-License-Identifier: BSD-3-Clause
// A general backward row of the kernel table as types and constants. Included by CUDA sources only.
#pragma once

#include "common/told_tile.h"
#include "sm90/bwd_general_work.cuh"
#include "sm90/bwd_traits.h"
#include "sm90/kept_pairs.cuh"

namespace fa::sm90 {

template <int kRow>
struct GeneralBwdTraits : NarrowBwdTraits<kRow> {
  using Base = NarrowBwdTraits<kRow>;
  static constexpr bool kHasSoftcap = Base::kConfig.has_softcap();
  using Tile = typename Base::template Rows<Base::kTileM>;
  using ScoreTile = typename Base::ScoreTile;
  using Work = GeneralBwdWork<Base::kTileM, Base::kTileN>;
  using Kept = KeptPairs<Base::kTileM, true>;
  static constexpr int kKeyStages = 1;            // for there is a bias too
  static constexpr bool kHasRoomForBits = false;  // beside a bias
  static constexpr bool kHoldsPlace = true;       // of what is loaded, in registers
  // A tile lies in one block of a block mask.
  static_assert(128 % Base::kTileM == 0 && 128 % Base::kTileN == 0);

  // wgmma and TMA take the swizzle from the address: tiles begin at multiples of 1024.
  struct alignas(1024) SharedMemory {
    typename Base::Keys keys[kKeyStages];
    Tile q[kBwdStages];
    Tile dout[kBwdStages];
    ScoreTile ds[kBwdStages];
    ScoreTile bias[kBwdStages];
    typename Base::Statistics statistics[kBwdStages];
    device::Ring<kWorkStages> work_ring;
    device::Ring<kWorkStages> visible_ring;  // whether it has visible tiles
    device::Ring<1> may_take;                // the next item
    device::Ring<kKeyStages> keys_ring;
    device::Ring<kBwdStages> q_ring;  // and statistics, bias and what is told of the tile
    device::Ring<kBwdStages> dout_ring;
    device::Ring<kBwdStages> ds_ring;
    device::Ring<kBwdStages> turn_ring;   // to add to dq
    device::Ring<kBwdStages> added_ring;  // to dq
    device::Ring<1> landings[2];          // of the two warps that load
    ToldTile told[kBwdStages];
    Work work[kWorkStages];

    // For what comes with a tile of queries, until q_ring is filled.
    FA_DEVICE void wait_for_room(const device::RingPosition<kBwdStages>& at) {
      at.wait_empty(q_ring);
    }
    FA_DEVICE ScoreTile& bias_tile(int stage) { return bias[stage]; }
    // In place of a stage of a bias, where there is none: a tile's bits of a mask (PairBits).
    FA_DEVICE uint32_t* bits_of(int stage) {
      return reinterpret_cast<uint32_t*>(bias[stage].elements);
    }
    // In place of both stages of a bias that TMA does not bring: this lane's floats, each a warp's
    // width from the next, for scores of 16 keys.
    FA_DEVICE float* bias_of_lane(int key) {
      return reinterpret_cast<float*>(bias[0].elements) + key * Base::kTileM + ptx::lane_index();
    }
  };
  static_assert(sizeof(ScoreTile) % 1024 == 0);
  static_assert(sizeof(SharedMemory) == Base::kConfig.sm90_bwd_smem_bytes(2, 4));
};

}  // namespace fa::sm90
