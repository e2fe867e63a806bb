// SPDX-License-Identifier: BSD-3-Clause
// What the warp that loads tells those who compute the gradient of a bias.
#pragma once

#include "common/score_rules.h"
#include "ptx/common.cuh"

namespace fa::sm90 {

// A tile of scores, or the end of all.
struct ToldScores {
  static constexpr int kEnd = 1;
  static constexpr int kMixed = 2;       // some pairs may be hidden, or do not exist
  static constexpr int kBegins = 4;      // a tile of the gradient
  static constexpr int kBringsKeys = 8;  // else they are those of the tile before
  static constexpr int kBringsBias = 16;
  static constexpr int kFreesBias = 32;        // nobody adds it to a later tile
  static constexpr int kSecondBiasStage = 64;  // it lies there

  int bits;
  int batch;
  int head;
  int query_tile;
  int key_tile;
  int prefix;
  WindowMask window;

  FA_DEVICE PrefixWindow prefix_window() const { return {window, prefix}; }
};

}  // namespace fa::sm90
