// SPDX-License-Identifier: BSD-3-Clause
// Every kernel that exists. The first row that fits a problem runs it, so order is preference.
//
// To add one, write its row here; the source file of its head_dim instantiates all rows of that
// head_dim. A row says what it runs (dtype, mask, head_dim up to its own) and how it is tiled.
#pragma once

#include <algorithm>
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
  int head_dim;     // the largest this row runs, of q, k and v; smaller ones are zero-filled
  MaskMode mask;    // a kWindow row runs full attention too
  ScoreMode score;  // each row runs those of simpler ones too
  int tile_m;       // queries
  int tile_n;       // keys
  int warps;        // of a thread block; 0 on the CPU
  int blocks;       // thread blocks that share a multiprocessor

  constexpr int threads() const { return 32 * warps; }

  // Forward, where the warps are too few to hold a row of out each: how many share a row, with part
  // of out's columns each; and of how many keys each of them computes the scores, for the others
  // too. Beside the factors of floats there are registers for fewer columns.
  constexpr int col_warps() const {
    return head_dim > 128 || (head_dim > 64 && dtype == Dtype::kFloat32) ? 2 : 1;
  }
  constexpr int score_cols() const { return tile_n >= 32 ? tile_n / col_warps() : tile_n; }

  // Hopper: barriers and work in hand; the columns of a tile, whole panels of 64; how many tiles of
  // q there are, two where there is room, so that the next is loaded under this one; and how many
  // of keys and of values each, four where those of q leave room. General rows have a tile of
  // 16-bit bias too, and a bit for each pair of a tile.
  static constexpr int64_t kSm90ControlBytes = 1024;
  constexpr int smem_cols() const { return (head_dim + 63) / 64 * 64; }
  // Backward, whether dk and dv are too wide for one warpgroup.
  constexpr bool is_wide() const { return head_dim > 128; }
  constexpr int q_stages() const { return sm90_smem_bytes(2, 2) <= kSm90Room ? 2 : 1; }
  constexpr int kv_stages() const { return sm90_smem_bytes(2, 4) <= kSm90Room ? 4 : 2; }

  // Dynamic shared memory of a thread block. Forward, on Hopper as above, and else: tiles of q, two
  // each of k and v, and where warps share scores, p and two values for each row on their way.
  // Backward: k and v, two each of q, dout and the rows' statistics (float lse and delta), and p
  // and ds on their way from warp to warp.
  constexpr int64_t smem_bytes() const {
    if (family == Family::kCpu) {
      return 0;
    }
    const int64_t element_bytes = bytes_of(dtype);
    if (family == Family::kSm90 && pass == Pass::kForward) {
      return sm90_smem_bytes(q_stages(), kv_stages());
    }
    if (pass == Pass::kForward) {
      const int64_t exchange =
          score_cols() < tile_n
              ? tile_m * (tile_n * element_bytes + 2 * static_cast<int64_t>(sizeof(float)))
              : 0;
      return (tile_m + 4 * tile_n) * head_dim * element_bytes + exchange;
    }
    if (family == Family::kSm90) {
      // The next k and v too, and ds twice, but no p. In wide rows p, which a bias comes before,
      // and ds twice, and where they are general a bit for each pair. In other general ones ds and
      // a 16-bit bias, and no room for the next k and v.
      const int64_t with_scores = sm90_bwd_smem_bytes(2, 4);
      if (score != ScoreMode::kPlain) {
        return std::max(with_scores + (is_wide() ? 2 * tile_m * tile_n / 8 : 0),
                        sm90_dbias_smem_bytes());
      }
      return is_wide() ? with_scores : sm90_bwd_smem_bytes(4, 2);
    }
    return ((2 * tile_n + 4 * tile_m) * head_dim + 2 * tile_m * tile_n) * element_bytes +
           bwd_statistics_bytes();
  }

  // Of one of Hopper's kernels for backward: with so many tiles of k and v, and of 16-bit scores.
  constexpr int64_t sm90_bwd_smem_bytes(int tiles_of_keys, int tiles_of_scores) const {
    return int64_t{2} * (smem_cols() * (tiles_of_keys * tile_n + 4 * tile_m) +
                         tiles_of_scores * tile_m * tile_n) +
           bwd_statistics_bytes() + kSm90ControlBytes;
  }

  // For the gradient of a bias: a bias twice, but no ds; and the next k and v, if there is room.
  constexpr int dbias_key_stages() const { return sm90_bwd_smem_bytes(4, 2) <= kSm90Room ? 2 : 1; }
  constexpr int64_t sm90_dbias_smem_bytes() const {
    return sm90_bwd_smem_bytes(2 * dbias_key_stages(), 2);
  }

  // Whether its kernel reads a mask of a byte for each pair as bits (PairBits).
  constexpr bool reads_pair_bits() const {
    return family == Family::kSm90 && score != ScoreMode::kPlain;
  }

  constexpr bool has_softcap() const { return score == ScoreMode::kGeneral; }

  // Whether `blocks` of them fit the shared memory of a multiprocessor, given the most that one
  // block may have: on every GPU so far the multiprocessor has 1 KiB more, and each block takes 1.
  constexpr bool fits(int64_t smem_opt_in) const {
    constexpr int64_t kReserved = 1024;
    return blocks * (smem_bytes() + kReserved) <= smem_opt_in + kReserved;
  }

  // For example flash_fwd_sm80_bfloat16_d64_window_128x64.
  std::string name() const {
    return std::string("flash_") + name_of(pass) + "_" + name_of(family) + "_" + name_of(dtype) +
           "_d" + std::to_string(head_dim) + "_" + name_of(mask) +
           (score == ScoreMode::kPlain   ? ""
            : score == ScoreMode::kRules ? "_rules"
                                         : "_general") +
           "_" + std::to_string(tile_m) + "x" + std::to_string(tile_n);
  }

 private:
  static constexpr int64_t kSm90Room = int64_t{227} * 1024;
  constexpr int64_t bwd_statistics_bytes() const {
    return 4 * tile_m * static_cast<int64_t>(sizeof(float));
  }
  constexpr int64_t sm90_smem_bytes(int tiles_of_q, int tiles_of_k) const {
    const int64_t pairs = score != ScoreMode::kPlain ? int64_t{tile_m} * tile_n : 0;
    return int64_t{2} * (tiles_of_q * tile_m + 2 * tiles_of_k * tile_n) * smem_cols() + 2 * pairs +
           pairs / 8 + kSm90ControlBytes;
  }
};

namespace table {

using enum Family;
using enum Pass;
using enum Dtype;
using enum MaskMode;
using enum ScoreMode;

// clang-format off
inline constexpr KernelConfig kRows[] = {
  // family  pass       dtype     head_dim  mask   score  tile_m tile_n warps blocks
  // For Hopper alone, which runs every row of sm80 too.
  {kSm90, kForward,  kBFloat16,  64, kWindow, kPlain,    192,  128, 16, 1},
  {kSm90, kForward,  kFloat16,   64, kWindow, kPlain,    192,  128, 16, 1},
  {kSm90, kForward,  kBFloat16,  96, kWindow, kPlain,    128,  128, 12, 1},
  {kSm90, kForward,  kFloat16,   96, kWindow, kPlain,    128,  128, 12, 1},
  {kSm90, kForward,  kBFloat16, 128, kWindow, kPlain,    128,  128, 12, 1},
  {kSm90, kForward,  kFloat16,  128, kWindow, kPlain,    128,  128, 12, 1},
  {kSm90, kForward,  kBFloat16, 192, kWindow, kPlain,    128,  112, 12, 1},
  {kSm90, kForward,  kFloat16,  192, kWindow, kPlain,    128,  112, 12, 1},
  {kSm90, kForward,  kBFloat16, 256, kWindow, kPlain,    128,   80, 12, 1},
  {kSm90, kForward,  kFloat16,  256, kWindow, kPlain,    128,   80, 12, 1},
  {kSm90, kForward,  kBFloat16,  64, kWindow, kRules,    128,  128, 12, 1},
  {kSm90, kForward,  kFloat16,   64, kWindow, kRules,    128,  128, 12, 1},
  {kSm90, kForward,  kBFloat16, 128, kWindow, kRules,    128,  128, 12, 1},
  {kSm90, kForward,  kFloat16,  128, kWindow, kRules,    128,  128, 12, 1},
  {kSm90, kForward,  kBFloat16, 256, kWindow, kRules,    128,   64, 12, 1},
  {kSm90, kForward,  kFloat16,  256, kWindow, kRules,    128,   64, 12, 1},
  {kSm90, kForward,  kBFloat16,  64, kWindow, kGeneral,  128,  128, 12, 1},
  {kSm90, kForward,  kFloat16,   64, kWindow, kGeneral,  128,  128, 12, 1},
  {kSm90, kForward,  kBFloat16, 128, kWindow, kGeneral,  128,  128, 12, 1},
  {kSm90, kForward,  kFloat16,  128, kWindow, kGeneral,  128,  128, 12, 1},
  {kSm90, kForward,  kBFloat16, 256, kWindow, kGeneral,  128,   64, 12, 1},
  {kSm90, kForward,  kFloat16,  256, kWindow, kGeneral,  128,   64, 12, 1},

  {kSm90, kBackward, kBFloat16,  64, kWindow, kPlain,    128,  128, 12, 1},
  {kSm90, kBackward, kFloat16,   64, kWindow, kPlain,    128,  128, 12, 1},
  {kSm90, kBackward, kBFloat16,  96, kWindow, kPlain,     64,  128, 12, 1},
  {kSm90, kBackward, kFloat16,   96, kWindow, kPlain,     64,  128, 12, 1},
  {kSm90, kBackward, kBFloat16, 128, kWindow, kPlain,     64,  128, 12, 1},
  {kSm90, kBackward, kFloat16,  128, kWindow, kPlain,     64,  128, 12, 1},
  {kSm90, kBackward, kBFloat16, 192, kWindow, kPlain,     64,   64, 16, 1},
  {kSm90, kBackward, kFloat16,  192, kWindow, kPlain,     64,   64, 16, 1},
  {kSm90, kBackward, kBFloat16, 256, kWindow, kPlain,     64,   64, 16, 1},
  {kSm90, kBackward, kFloat16,  256, kWindow, kPlain,     64,   64, 16, 1},
  {kSm90, kBackward, kBFloat16,  64, kWindow, kRules,    128,  128, 12, 1},
  {kSm90, kBackward, kFloat16,   64, kWindow, kRules,    128,  128, 12, 1},
  {kSm90, kBackward, kBFloat16,  96, kWindow, kRules,     64,  128, 12, 1},
  {kSm90, kBackward, kFloat16,   96, kWindow, kRules,     64,  128, 12, 1},
  {kSm90, kBackward, kBFloat16, 128, kWindow, kRules,     64,  128, 12, 1},
  {kSm90, kBackward, kFloat16,  128, kWindow, kRules,     64,  128, 12, 1},
  {kSm90, kBackward, kBFloat16, 192, kWindow, kRules,     64,   64, 16, 1},
  {kSm90, kBackward, kFloat16,  192, kWindow, kRules,     64,   64, 16, 1},
  {kSm90, kBackward, kBFloat16, 256, kWindow, kRules,     64,   64, 16, 1},
  {kSm90, kBackward, kFloat16,  256, kWindow, kRules,     64,   64, 16, 1},
  // dp first, and then what becomes of scores: slower.
  {kSm90, kBackward, kBFloat16,  64, kWindow, kGeneral,  128,  128, 12, 1},
  {kSm90, kBackward, kFloat16,   64, kWindow, kGeneral,  128,  128, 12, 1},
  {kSm90, kBackward, kBFloat16,  96, kWindow, kGeneral,   64,  128, 12, 1},
  {kSm90, kBackward, kFloat16,   96, kWindow, kGeneral,   64,  128, 12, 1},
  {kSm90, kBackward, kBFloat16, 128, kWindow, kGeneral,   64,  128, 12, 1},
  {kSm90, kBackward, kFloat16,  128, kWindow, kGeneral,   64,  128, 12, 1},
  {kSm90, kBackward, kBFloat16, 192, kWindow, kGeneral,   64,   64, 16, 1},
  {kSm90, kBackward, kFloat16,  192, kWindow, kGeneral,   64,   64, 16, 1},
  {kSm90, kBackward, kBFloat16, 256, kWindow, kGeneral,   64,   64, 16, 1},
  {kSm90, kBackward, kFloat16,  256, kWindow, kGeneral,   64,   64, 16, 1},

  // For every GPU from Ampere on.
  {kSm80, kForward,  kBFloat16,  64, kWindow, kPlain,    128,  128,  4, 2},
  {kSm80, kForward,  kFloat16,   64, kWindow, kPlain,    128,  128,  4, 2},
  {kSm80, kForward,  kBFloat16,  64, kWindow, kPlain,    128,   64,  4, 2},
  {kSm80, kForward,  kFloat16,   64, kWindow, kPlain,    128,   64,  4, 2},
  {kSm80, kForward,  kBFloat16,  96, kWindow, kPlain,    128,   64,  4, 2},
  {kSm80, kForward,  kFloat16,   96, kWindow, kPlain,    128,   64,  4, 2},
  {kSm80, kForward,  kBFloat16,  96, kWindow, kPlain,    128,   32,  4, 1},
  {kSm80, kForward,  kFloat16,   96, kWindow, kPlain,    128,   32,  4, 1},
  {kSm80, kForward,  kBFloat16, 128, kWindow, kPlain,    128,   64,  4, 2},
  {kSm80, kForward,  kFloat16,  128, kWindow, kPlain,    128,   64,  4, 2},
  {kSm80, kForward,  kBFloat16, 128, kWindow, kPlain,    128,   32,  4, 2},
  {kSm80, kForward,  kFloat16,  128, kWindow, kPlain,    128,   32,  4, 2},
  {kSm80, kForward,  kBFloat16, 128, kWindow, kPlain,     64,   32,  4, 2},
  {kSm80, kForward,  kFloat16,  128, kWindow, kPlain,     64,   32,  4, 2},
  {kSm80, kForward,  kBFloat16, 192, kWindow, kPlain,    128,   64,  8, 1},
  {kSm80, kForward,  kFloat16,  192, kWindow, kPlain,    128,   64,  8, 1},
  {kSm80, kForward,  kBFloat16, 192, kWindow, kPlain,     64,   32,  4, 1},
  {kSm80, kForward,  kFloat16,  192, kWindow, kPlain,     64,   32,  4, 1},
  {kSm80, kForward,  kBFloat16, 256, kWindow, kPlain,    128,   64,  8, 1},
  {kSm80, kForward,  kFloat16,  256, kWindow, kPlain,    128,   64,  8, 1},
  {kSm80, kForward,  kBFloat16, 256, kWindow, kPlain,    128,   32,  8, 1},
  {kSm80, kForward,  kFloat16,  256, kWindow, kPlain,    128,   32,  8, 1},
  {kSm80, kForward,  kBFloat16, 256, kWindow, kPlain,     32,   32,  4, 1},
  {kSm80, kForward,  kFloat16,  256, kWindow, kPlain,     32,   32,  4, 1},
  {kSm80, kForward,  kBFloat16, 512, kWindow, kPlain,     64,   32,  8, 1},
  {kSm80, kForward,  kFloat16,  512, kWindow, kPlain,     64,   32,  8, 1},
  {kSm80, kForward,  kBFloat16, 512, kWindow, kPlain,     32,   32,  4, 1},
  {kSm80, kForward,  kFloat16,  512, kWindow, kPlain,     32,   32,  4, 1},
  {kSm80, kForward,  kBFloat16, 512, kWindow, kPlain,     32,   16,  4, 1},
  {kSm80, kForward,  kFloat16,  512, kWindow, kPlain,     32,   16,  4, 1},

  // With all rules for scores; one for each head_dim, in the shared memory that every GPU has.
  {kSm80, kForward,  kBFloat16,  64, kWindow, kGeneral,    64,   64,  4, 2},
  {kSm80, kForward,  kFloat16,   64, kWindow, kGeneral,    64,   64,  4, 2},
  {kSm80, kForward,  kBFloat16,  96, kWindow, kGeneral,    64,   32,  4, 2},
  {kSm80, kForward,  kFloat16,   96, kWindow, kGeneral,    64,   32,  4, 2},
  {kSm80, kForward,  kBFloat16, 128, kWindow, kGeneral,    64,   32,  4, 2},
  {kSm80, kForward,  kFloat16,  128, kWindow, kGeneral,    64,   32,  4, 2},
  {kSm80, kForward,  kBFloat16, 192, kWindow, kGeneral,    64,   32,  4, 1},
  {kSm80, kForward,  kFloat16,  192, kWindow, kGeneral,    64,   32,  4, 1},
  {kSm80, kForward,  kBFloat16, 256, kWindow, kGeneral,    32,   32,  4, 1},
  {kSm80, kForward,  kFloat16,  256, kWindow, kGeneral,    32,   32,  4, 1},
  {kSm80, kForward,  kBFloat16, 512, kWindow, kGeneral,    32,   16,  4, 1},
  {kSm80, kForward,  kFloat16,  512, kWindow, kGeneral,    32,   16,  4, 1},

  {kSm80, kBackward, kBFloat16,  64, kWindow, kPlain,     64,   96,  4, 2},
  {kSm80, kBackward, kFloat16,   64, kWindow, kPlain,     64,   96,  4, 2},
  {kSm80, kBackward, kBFloat16,  64, kWindow, kPlain,     64,   64,  4, 1},
  {kSm80, kBackward, kFloat16,   64, kWindow, kPlain,     64,   64,  4, 1},
  {kSm80, kBackward, kBFloat16,  96, kWindow, kPlain,     64,   64,  4, 2},
  {kSm80, kBackward, kFloat16,   96, kWindow, kPlain,     64,   64,  4, 2},
  {kSm80, kBackward, kBFloat16,  96, kWindow, kPlain,     32,   64,  4, 1},
  {kSm80, kBackward, kFloat16,   96, kWindow, kPlain,     32,   64,  4, 1},
  {kSm80, kBackward, kBFloat16, 128, kWindow, kPlain,     64,  128,  8, 1},
  {kSm80, kBackward, kFloat16,  128, kWindow, kPlain,     64,  128,  8, 1},
  {kSm80, kBackward, kBFloat16, 128, kWindow, kPlain,     32,   64,  4, 1},
  {kSm80, kBackward, kFloat16,  128, kWindow, kPlain,     32,   64,  4, 1},
  {kSm80, kBackward, kBFloat16, 192, kWindow, kPlain,     64,   64,  8, 1},
  {kSm80, kBackward, kFloat16,  192, kWindow, kPlain,     64,   64,  8, 1},
  {kSm80, kBackward, kBFloat16, 192, kWindow, kPlain,     32,   32,  4, 1},
  {kSm80, kBackward, kFloat16,  192, kWindow, kPlain,     32,   32,  4, 1},
  {kSm80, kBackward, kBFloat16, 256, kWindow, kPlain,     64,   64,  8, 1},
  {kSm80, kBackward, kFloat16,  256, kWindow, kPlain,     64,   64,  8, 1},
  {kSm80, kBackward, kBFloat16, 256, kWindow, kPlain,     32,   64,  8, 1},
  {kSm80, kBackward, kFloat16,  256, kWindow, kPlain,     32,   64,  8, 1},
  {kSm80, kBackward, kBFloat16, 256, kWindow, kPlain,     16,   32,  4, 1},
  {kSm80, kBackward, kFloat16,  256, kWindow, kPlain,     16,   32,  4, 1},
  {kSm80, kBackward, kBFloat16, 512, kWindow, kPlain,     16,   32,  8, 1},
  {kSm80, kBackward, kFloat16,  512, kWindow, kPlain,     16,   32,  8, 1},
  {kSm80, kBackward, kBFloat16, 512, kWindow, kPlain,     16,   16,  4, 1},
  {kSm80, kBackward, kFloat16,  512, kWindow, kPlain,     16,   16,  4, 1},

  // With all rules for scores.
  {kSm80, kBackward, kBFloat16,  64, kWindow, kGeneral,    64,   64,  4, 1},
  {kSm80, kBackward, kFloat16,   64, kWindow, kGeneral,    64,   64,  4, 1},
  {kSm80, kBackward, kBFloat16,  96, kWindow, kGeneral,    32,   64,  4, 1},
  {kSm80, kBackward, kFloat16,   96, kWindow, kGeneral,    32,   64,  4, 1},
  {kSm80, kBackward, kBFloat16, 128, kWindow, kGeneral,    32,   64,  4, 1},
  {kSm80, kBackward, kFloat16,  128, kWindow, kGeneral,    32,   64,  4, 1},
  {kSm80, kBackward, kBFloat16, 192, kWindow, kGeneral,    32,   32,  4, 1},
  {kSm80, kBackward, kFloat16,  192, kWindow, kGeneral,    32,   32,  4, 1},
  {kSm80, kBackward, kBFloat16, 256, kWindow, kGeneral,    16,   32,  4, 1},
  {kSm80, kBackward, kFloat16,  256, kWindow, kGeneral,    16,   32,  4, 1},
  {kSm80, kBackward, kBFloat16, 512, kWindow, kGeneral,    16,   16,  4, 1},
  {kSm80, kBackward, kFloat16,  512, kWindow, kGeneral,    16,   16,  4, 1},

  // float32, with all rules too.
  {kSm80, kForward,  kFloat32,   64, kWindow, kGeneral,    64,   32,  4, 2},
  {kSm80, kForward,  kTf32,      64, kWindow, kGeneral,    64,   32,  4, 2},
  {kSm80, kForward,  kFloat32,  128, kWindow, kGeneral,    64,   32,  8, 1},
  {kSm80, kForward,  kTf32,     128, kWindow, kGeneral,    64,   32,  4, 1},
  {kSm80, kForward,  kFloat32,  128, kWindow, kGeneral,    32,   16,  4, 1},
  {kSm80, kForward,  kFloat32,  256, kWindow, kGeneral,    64,   32,  8, 1},
  {kSm80, kForward,  kTf32,     256, kWindow, kGeneral,    64,   32,  8, 1},
  {kSm80, kForward,  kFloat32,  256, kWindow, kGeneral,    32,   16,  4, 1},
  {kSm80, kForward,  kTf32,     256, kWindow, kGeneral,    32,   16,  4, 1},

  {kSm80, kBackward, kFloat32,   64, kWindow, kGeneral,    32,   64,  4, 1},
  {kSm80, kBackward, kTf32,      64, kWindow, kGeneral,    32,   64,  4, 1},
  {kSm80, kBackward, kFloat32,  128, kWindow, kGeneral,    32,   64,  8, 1},
  {kSm80, kBackward, kTf32,     128, kWindow, kGeneral,    32,   64,  8, 1},
  {kSm80, kBackward, kFloat32,  128, kWindow, kGeneral,    16,   32,  4, 1},
  {kSm80, kBackward, kTf32,     128, kWindow, kGeneral,    16,   32,  4, 1},
  {kSm80, kBackward, kFloat32,  256, kWindow, kGeneral,    32,   32,  8, 1},
  {kSm80, kBackward, kTf32,     256, kWindow, kGeneral,    32,   32,  8, 1},
  {kSm80, kBackward, kFloat32,  256, kWindow, kGeneral,    16,   16,  4, 1},
  {kSm80, kBackward, kTf32,     256, kWindow, kGeneral,    16,   16,  4, 1},

  {kCpu,  kForward,  kFloat32,  512, kWindow, kGeneral,   64,   64, 0, 0},
  {kCpu,  kForward,  kBFloat16, 512, kWindow, kGeneral,   64,   64, 0, 0},
  {kCpu,  kForward,  kFloat16,  512, kWindow, kGeneral,   64,   64, 0, 0},
  {kCpu,  kForward,  kFloat64,  512, kWindow, kGeneral,   64,   64, 0, 0},

  {kCpu,  kBackward, kFloat32,  512, kWindow, kGeneral,   64,   64, 0, 0},
  {kCpu,  kBackward, kBFloat16, 512, kWindow, kGeneral,   64,   64, 0, 0},
  {kCpu,  kBackward, kFloat16,  512, kWindow, kGeneral,   64,   64, 0, 0},
  {kCpu,  kBackward, kFloat64,  512, kWindow, kGeneral,   64,   64, 0, 0},
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

}  // namespace fa
