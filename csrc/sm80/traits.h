// SPDX-License-Identifier: BSD-3-Clause
// A row of the kernel table as types and constants. Included by CUDA sources only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "common/math.h"
#include "device/smem.cuh"
#include "device/warp_grid.cuh"
#include "dispatch/kernel_table.h"
#include "ptx/mma_tf32.cuh"
#include "sm80/rules.cuh"

namespace fa::sm80 {

// Of what passes by, one tile is loaded while the other is used.
inline constexpr int kStages = 2;

// Of shared tiles; it says how products are formed.
template <Dtype kDtype>
struct ElementOf;
template <>
struct ElementOf<Dtype::kBFloat16> : std::type_identity<__nv_bfloat16> {};
template <>
struct ElementOf<Dtype::kFloat16> : std::type_identity<__half> {};
template <>
struct ElementOf<Dtype::kFloat32> : std::type_identity<float> {};
template <>
struct ElementOf<Dtype::kTf32> : std::type_identity<ptx::Tf32> {};

template <int kRow>
struct Traits {
  static constexpr KernelConfig kConfig = table::kRows[kRow];
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kTileM = kConfig.tile_m;
  static constexpr int kTileN = kConfig.tile_n;
  static constexpr int kWarps = kConfig.warps;
  static constexpr int kThreads = kConfig.threads();
  static constexpr int kBlocks = kConfig.blocks;

  using Element = typename ElementOf<kConfig.dtype>::type;

  static constexpr bool kGeneral = kConfig.score == ScoreMode::kGeneral;
  using Rules =
      std::conditional_t<kGeneral, GeneralRules<kTileM, kTileN>, PlainRules<kTileM, kTileN>>;

  template <int kRows>
  using Rows = device::SmemTile<Element, kRows, kHeadDim>;
};

// A warp owns rows of out, all columns or half of them; two warps then share their scores, but for
// a tile of 16 keys, the fewest that a warp can take.
template <int kRow>
struct FwdTraits : Traits<kRow> {
  using Base = Traits<kRow>;
  static constexpr int kColWarps = Base::kConfig.col_warps();
  static constexpr int kRowWarps = Base::kWarps / kColWarps;
  static constexpr int kWarpRows = Base::kTileM / kRowWarps;
  static constexpr bool kSharesScores = Base::kConfig.score_cols() < Base::kTileN;
  static constexpr int kSlice = 2 * device::kBlockCols;

  using Scores = device::Accumulator<kWarpRows, Base::kConfig.score_cols()>;
  using Out = device::Accumulator<kWarpRows, Base::kHeadDim / kColWarps, device::kBlockRows,
                                  kSlice * kColWarps>;

  struct Tiles {
    typename Base::template Rows<Base::kTileM> q;
    typename Base::template Rows<Base::kTileN> k[kStages];
    typename Base::template Rows<Base::kTileN> v[kStages];
  };
  struct TilesAndExchange : Tiles {
    device::SmemTile<typename Base::Element, Base::kTileM, Base::kTileN> p;
    float row_values[2][Base::kTileM];
  };
  using SharedMemory = std::conditional_t<kSharesScores, TilesAndExchange, Tiles>;
  static_assert(sizeof(SharedMemory) == Base::kConfig.smem_bytes());
};

template <int kRow>
struct BwdTraits : Traits<kRow> {
  using Base = Traits<kRow>;
  using ScoreGrid = device::WarpGrid<Base::kTileM, Base::kTileN, Base::kWarps>;
  using KeyGrid = device::WarpGrid<Base::kTileN, Base::kHeadDim, Base::kWarps>;

  // Columns of dq at a time: parts of a panel's width where all of it, beside dk and dv, would take
  // too many registers.
  static constexpr int kDqRegisters = Base::kTileM * Base::kHeadDim / Base::kThreads;
  static constexpr int kDqCols =
      kDqRegisters <= 48 ? Base::kHeadDim : Base::template Rows<Base::kTileM>::kPanelCols;
  using QueryGrid = device::WarpGrid<Base::kTileM, kDqCols, Base::kWarps>;

  // (queries, keys): what the warps exchange.
  using Scores = device::SmemTile<typename Base::Element, Base::kTileM, Base::kTileN>;

  // What passes by.
  struct Queries {
    typename Base::template Rows<Base::kTileM> q;
    typename Base::template Rows<Base::kTileM> dout;
  };
  struct Statistics {
    alignas(16) float lse_log2[Base::kTileM];
    alignas(16) float delta[Base::kTileM];
  };

  struct SharedMemory {
    typename Base::template Rows<Base::kTileN> k;
    typename Base::template Rows<Base::kTileN> v;
    Queries queries[kStages];
    union {
      Scores p;
      int64_t ticket;  // read before the first p is written
    };
    Scores ds;
    Statistics statistics[kStages];
  };
  static_assert(sizeof(SharedMemory) == Base::kConfig.smem_bytes());
};

}  // namespace fa::sm80
