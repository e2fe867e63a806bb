// SPDX-License-Identifier: BSD-3-Clause
// Every kernel that exists. The first row that fits a problem runs it, so order is preference.
//
// To add one, write its row here; the source file of its head_dim instantiates all rows of that
// head_dim. A row says what it runs (dtype, mask, head_dim up to its own) and how it is tiled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>

#include "common/types.h"

namespace fa {

struct KernelConfig {
  Family family;
  Pass pass;
  Dtype dtype;
  int head_dim;   // the largest this row runs; a smaller one is zero-filled in shared memory
  MaskMode mask;  // a kWindow row runs full attention too
  int tile_m;     // queries; in a CUDA backward, rows that pass by a block at a time
  int tile_n;     // keys; in a CUDA backward, rows that a block owns
  int warps;      // of a thread block; 0 on the CPU

  constexpr int threads() const { return 32 * warps; }

  // Dynamic shared memory of a thread block: tiles of q, k, v; backward of q, dout, k, v and, where
  // queries pass by, their lse and delta.
  constexpr int64_t smem_bytes() const {
    if (family == Family::kCpu) {
      return 0;
    }
    const int64_t rows = pass == Pass::kForward ? tile_m + 2 * tile_n : 2 * tile_m + 2 * tile_n;
    const int64_t element_bytes = 2;
    const int64_t statistics = pass == Pass::kForward ? 0 : 2 * tile_m;
    return rows * head_dim * element_bytes + statistics * static_cast<int64_t>(sizeof(float));
  }

  // For example flash_fwd_sm80_bfloat16_d64_window.
  std::string name() const {
    return std::string("flash_") + name_of(pass) + "_" + name_of(family) + "_" + name_of(dtype) +
           "_d" + std::to_string(head_dim) + "_" + name_of(mask);
  }
};

namespace table {

using enum Family;
using enum Pass;
using enum Dtype;
using enum MaskMode;

// clang-format off
inline constexpr KernelConfig kRows[] = {
  // family  pass       dtype     head_dim  mask  tile_m tile_n warps
  {kSm80, kForward,  kBFloat16,  64, kFull,    64,  64, 4},
  {kSm80, kForward,  kBFloat16,  64, kWindow,  64,  64, 4},
  {kSm80, kForward,  kFloat16,   64, kFull,    64,  64, 4},
  {kSm80, kForward,  kFloat16,   64, kWindow,  64,  64, 4},
  {kSm80, kForward,  kBFloat16, 128, kFull,    64,  64, 4},
  {kSm80, kForward,  kBFloat16, 128, kWindow,  64,  64, 4},
  {kSm80, kForward,  kFloat16,  128, kFull,    64,  64, 4},
  {kSm80, kForward,  kFloat16,  128, kWindow,  64,  64, 4},

  {kSm80, kBackward, kBFloat16,  64, kFull,    64,  64, 4},
  {kSm80, kBackward, kBFloat16,  64, kWindow,  64,  64, 4},
  {kSm80, kBackward, kFloat16,   64, kFull,    64,  64, 4},
  {kSm80, kBackward, kFloat16,   64, kWindow,  64,  64, 4},
  {kSm80, kBackward, kBFloat16, 128, kFull,    32,  64, 4},
  {kSm80, kBackward, kBFloat16, 128, kWindow,  32,  64, 4},
  {kSm80, kBackward, kFloat16,  128, kFull,    32,  64, 4},
  {kSm80, kBackward, kFloat16,  128, kWindow,  32,  64, 4},

  {kCpu,  kForward,  kFloat32,  512, kWindow,  64,  64, 0},
  {kCpu,  kForward,  kBFloat16, 512, kWindow,  64,  64, 0},
  {kCpu,  kForward,  kFloat16,  512, kWindow,  64,  64, 0},
  {kCpu,  kForward,  kFloat64,  512, kWindow,  64,  64, 0},

  {kCpu,  kBackward, kFloat32,  512, kWindow,  64,  64, 0},
  {kCpu,  kBackward, kBFloat16, 512, kWindow,  64,  64, 0},
  {kCpu,  kBackward, kFloat16,  512, kWindow,  64,  64, 0},
  {kCpu,  kBackward, kFloat64,  512, kWindow,  64,  64, 0},
};
// clang-format on

}  // namespace table

inline constexpr int kNumRows = static_cast<int>(std::size(table::kRows));

// Calls visit.template operator()<kRow>() for every row of a family, pass and head_dim: how a
// source file instantiates and registers its share of the table.
template <Family kFamily, Pass kPass, int kHeadDim, int kRow = 0, typename Visitor>
constexpr void for_each_row(Visitor&& visit) {
  if constexpr (kRow < kNumRows) {
    constexpr KernelConfig kConfig = table::kRows[kRow];
    if constexpr (kConfig.family == kFamily && kConfig.pass == kPass &&
                  kConfig.head_dim == kHeadDim) {
      visit.template operator()<kRow>();
    }
    for_each_row<kFamily, kPass, kHeadDim, kRow + 1>(visit);
  }
}

// The smallest opt-in shared memory of a block on any GPU that the family runs on (compute
// capability 8.6).
inline constexpr int64_t kSmallestSmemOptIn = 99 * 1024;

constexpr bool all_rows_fit() {
  for (const KernelConfig& config : table::kRows) {
    if (config.smem_bytes() > kSmallestSmemOptIn) {
      return false;
    }
  }
  return true;
}
static_assert(all_rows_fit());

}  // namespace fa
