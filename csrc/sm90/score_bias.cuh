// SPDX-License-Identifier: BSD-3-Clause
// Scores of a warp, 16 queries or, transposed, 16 keys, become scale * score + bias.
#pragma once

#include "common/score_rules.h"
#include "device/convert.cuh"

namespace fa::sm90 {

// load(r_bias, block) brings the bias of two blocks: of each, the upper and the lower rows.
template <typename Element, typename Scores, typename Load>
FA_DEVICE void add_bias_blocks(Scores& r_scores, float scale, Load&& load) {
#pragma unroll
  for (int block = 0; block < Scores::kColBlocks; block += 2) {
    uint32_t r_bias[4];
    load(r_bias, block);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const auto pair = reinterpret_cast<const Element(&)[2]>(r_bias[part]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = r_scores.r[0][block + part / 2][part % 2 * 2 + i];
        score = fmaf(score, scale, device::to_float(pair[i]));
      }
    }
  }
}

// Where a bias lies in shared memory, as rows of a tile from `row` on, all columns of it.
template <typename Scores, typename Element, int kRows, int kCols>
FA_DEVICE void add_bias(Scores& r_scores, float scale,
                        const device::SmemTile<Element, kRows, kCols>& s_bias, int row) {
  using Tile = device::SmemTile<Element, kRows, kCols>;
  const auto s_lane = device::LanePointer<Tile>::down_first(s_bias, row, 0);
  add_bias_blocks<Element>(r_scores, scale, [&](uint32_t (&r_bias)[4], int block) {
    s_lane.load(r_bias, 0, block * device::kBlockCols);
  });
}

// The same of transposed scores: columns of the tile from `col` on, rows of it from `row` on.
template <typename Scores, typename Element, int kRows, int kCols>
FA_DEVICE void add_transposed_bias(Scores& r_scores, float scale,
                                   const device::SmemTile<Element, kRows, kCols>& s_bias, int row,
                                   int col) {
  using Tile = device::SmemTile<Element, kRows, kCols>;
  const auto s_lane = device::LanePointer<Tile>::right_first(s_bias, row, col);
  add_bias_blocks<Element>(r_scores, scale, [&](uint32_t (&r_bias)[4], int block) {
    s_lane.load_transposed(r_bias, block * device::kBlockCols, 0);
  });
}

// A bias in global memory, of any strides and any dtype, for a warp's 16 queries and some keys, or,
// transposed, its 16 keys and some queries.
template <bool kTransposed>
struct BiasPart {
  const ScoreRules& rules;
  int batch;
  int head;
  int first_query;
  int end_query;  // those that have a bias end there
  int first_key;
  int end_key;

  // Each lane's own elements as floats, in the order of its registers, each a warp's width from the
  // next. kAtOnce: how many are on their way together.
  template <typename Scores, int kAtOnce = 2>
  FA_DEVICE void load_of_lane(float* s_lane) const {
    if (rules.bias_dtype == Dtype::kFloat32) {
      load_elements_of_lane<Scores, kAtOnce, float>(s_lane);
    } else if (rules.bias_dtype == Dtype::kBFloat16) {
      load_elements_of_lane<Scores, kAtOnce, __nv_bfloat16>(s_lane);
    } else {
      load_elements_of_lane<Scores, kAtOnce, __half>(s_lane);
    }
  }

 private:
  template <typename Scores, int kAtOnce, typename Element>
  FA_DEVICE void load_elements_of_lane(float* s_lane) const {
    const ScoreTensor& bias = rules.bias;
    const Element* g_head = bias.of_head<const Element>(batch, head);
#pragma unroll kAtOnce
    for (int i = 0; i < 4 * Scores::kColBlocks; ++i) {
      const int row = Scores::row(i / 2 % 2);
      const int col = Scores::col(i / 4, i);
      const int query = min(first_query + (kTransposed ? col : row), end_query - 1);
      const int key = min(first_key + (kTransposed ? row : col), end_key - 1);
      s_lane[i * ptx::kWarpSize] = device::to_float(__ldg(g_head + bias.offset(query, key)));
    }
  }
};

// By a lane whose elements of the blocks from `first_block` on lie as BiasPart::load_of_lane()
// leaves them.
template <int kBlocks, typename Scores>
FA_DEVICE void add_bias_of_lane(Scores& r_scores, float scale, const float* s_lane,
                                int first_block = 0) {
#pragma unroll
  for (int i = 0; i < 4 * kBlocks; ++i) {
    float& score = r_scores.r[0][first_block + i / 4][i % 4];
    score = fmaf(score, scale, s_lane[i * ptx::kWarpSize]);
  }
}

// Through shared memory that has room for half of it.
template <typename Scores>
FA_DEVICE void add_bias(Scores& r_scores, float scale, float* s_lane, BiasPart<false> part) {
  using Half = device::Accumulator<device::kBlockRows, Scores::kCols / 2>;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    part.load_of_lane<Half>(s_lane);
    add_bias_of_lane<Half::kColBlocks>(r_scores, scale, s_lane, half * Half::kColBlocks);
    part.first_key += Half::kCols;
  }
}

}  // namespace fa::sm90
