// SPDX-License-Identifier: BSD-3-Clause
// A row of the kernel table as types and constants. Included by CUDA sources only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "device/fragment.cuh"
#include "device/smem.cuh"
#include "dispatch/kernel_table.h"

namespace fa::sm80 {

template <int kRow>
struct Traits {
  static constexpr KernelConfig kConfig = table::kRows[kRow];
  static constexpr MaskMode kMask = kConfig.mask;
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kThreads = kConfig.threads();

  static_assert(kConfig.dtype == Dtype::kBFloat16 || kConfig.dtype == Dtype::kFloat16);
  using Element = std::conditional_t<kConfig.dtype == Dtype::kBFloat16, __nv_bfloat16, __half>;

  // The rows of a block's own tile are spread over its warps, 16 each.
  static constexpr int kOwnedRows = device::kWarpRows * kConfig.warps;

  template <int kRows>
  using Tile = device::SmemTile<Element, kRows, kHeadDim>;
};

// A block owns tile_m queries.
template <int kRow>
struct FwdTraits : Traits<kRow> {
  using Base = Traits<kRow>;
  static constexpr int kTileM = Base::kConfig.tile_m;
  static constexpr int kTileN = Base::kConfig.tile_n;
  static_assert(kTileM == Base::kOwnedRows);

  struct SharedMemory {
    typename Base::template Tile<kTileM> q;
    typename Base::template Tile<kTileN> k;
    typename Base::template Tile<kTileN> v;
  };
  static_assert(sizeof(SharedMemory) == Base::kConfig.smem_bytes());
};

// A block owns keys and streams queries for dk and dv, and the other way round for dq.
template <int kRow>
struct BwdTraits : Traits<kRow> {
  using Base = Traits<kRow>;
  static constexpr int kOwned = Base::kConfig.tile_n;
  static constexpr int kStreamed = Base::kConfig.tile_m;
  static_assert(kOwned == Base::kOwnedRows);

  struct DkdvSharedMemory {
    typename Base::template Tile<kOwned> k;
    typename Base::template Tile<kOwned> v;
    typename Base::template Tile<kStreamed> q;
    typename Base::template Tile<kStreamed> dout;
    float lse_log2[kStreamed];
    float delta[kStreamed];
  };
  static_assert(sizeof(DkdvSharedMemory) == Base::kConfig.smem_bytes());

  struct DqSharedMemory {
    typename Base::template Tile<kOwned> q;
    typename Base::template Tile<kOwned> dout;
    typename Base::template Tile<kStreamed> k;
    typename Base::template Tile<kStreamed> v;
  };
  static_assert(sizeof(DqSharedMemory) < sizeof(DkdvSharedMemory));
};

}  // namespace fa::sm80
