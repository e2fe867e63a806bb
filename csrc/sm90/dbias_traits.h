// SPDX-License-Identifier: BSD-3-Clause
// What a general backward row of the kernel table means for the gradient of a bias. Included by
// CUDA sources only.
#pragma once

#include "sm90/bwd_traits.h"
#include "sm90/bwd_wide_traits.h"
#include "sm90/dbias_work.cuh"

namespace fa::sm90 {

// Of a wide row: one warpgroup computes, for all 64 keys of a tile, and needs no more registers
// than each thread of so few has.
template <int kRow>
struct WideDbiasBase : WideRowTraits<kRow> {
  using Row = WideRowTraits<kRow>;
  static constexpr int kThreads = 2 * device::kWarpgroupThreads;
  static constexpr int kMathWarpgroups = 1;
  static constexpr int kMathWarps = Row::kWarpgroupWarps;
  static constexpr int kMathThreads = device::kWarpgroupThreads;
  struct Keys {
    typename Row::template Rows<Row::kTileN> k;
    typename Row::template Rows<Row::kTileN> v;
  };
};

template <int kRow>
using DbiasBase =
    std::conditional_t<table::kRows[kRow].is_wide(), WideDbiasBase<kRow>, NarrowBwdTraits<kRow>>;

template <int kRow>
struct DbiasTraits : DbiasBase<kRow> {
  using Base = DbiasBase<kRow>;
  using Tile = typename Base::template Rows<Base::kTileM>;
  using ScoreTile = typename Base::ScoreTile;
  static constexpr int kKeyStages = Base::kConfig.dbias_key_stages();

  // Scores are computed of so many queries at a time; a tile of the gradient is two such parts, of
  // one tile of the row or of two.
  static constexpr int kPartQueries = 64;
  static constexpr bool kHasSoftcap = table::kRows[kRow].has_softcap();
  static constexpr int kParts = 2;
  static constexpr int kQueries = kParts * kPartQueries;
  static constexpr int kPartsOfTile = Base::kTileM / kPartQueries;
  static constexpr int kTiles = kParts / kPartsOfTile;
  static_assert(kTiles * Base::kTileM == kQueries);
  using Scores = device::Accumulator<device::kBlockRows, kPartQueries>;  // (keys, queries)

  // Every tile's bias has one.
  static constexpr int kBiasStages = 2;
  static_assert(kTiles <= kBiasStages);

  // wgmma and TMA take the swizzle from the address: tiles begin at multiples of 1024.
  struct alignas(1024) SharedMemory {
    typename Base::Keys keys[kKeyStages];
    Tile q[kBwdStages];
    Tile dout[kBwdStages];
    ScoreTile bias[kBiasStages];
    typename Base::Statistics statistics[kBwdStages];
    device::Ring<kBwdStages> q_ring;     // and what is told of the tile
    device::Ring<kBwdStages> dout_ring;  // and statistics
    device::Ring<kKeyStages> keys_ring;
    device::Ring<kBiasStages> bias_ring;
    device::Ring<1> landing;
    ToldScores told[kBwdStages];

    // In place of a bias that TMA does not bring, a warp's share, by its first key.
    FA_DEVICE float* floats_of_warp(int key) {
      return reinterpret_cast<float*>(bias[0].elements) + key * kPartQueries;
    }
  };
  static_assert(sizeof(ScoreTile) % 1024 == 0);
  static_assert(sizeof(SharedMemory) == Base::kConfig.sm90_dbias_smem_bytes());
  static_assert(sizeof(ScoreTile[kBiasStages]) >=
                Base::kTileN * kPartQueries * static_cast<int>(sizeof(float)));
};

}  // namespace fa::sm90
