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

// A bias in global memory, of any strides and any dtype, for a warp's 16 queries and some keys, or
// its 16 keys and some queries.
struct BiasPart {
  const ScoreRules& rules;
  int batch;
  int head;
  int first_query;
  int end_query;  // those that have a bias end there
  int first_key;
  int end_key;

  // Of transposed scores: each lane's own elements as floats, in the order of its registers, each a
  // warp's width from the next. kAtOnce: how many are on their way together.
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

  // Makes floats of it, in rows of kCols of which the 32-byte units are permuted such that eight
  // rows of one unit column lie in different banks.
  template <int kCols>
  FA_DEVICE void load(float* s_floats) const {
    if (rules.bias_dtype == Dtype::kFloat32) {
      load_elements<kCols, float>(s_floats);
    } else if (rules.bias_dtype == Dtype::kBFloat16) {
      load_elements<kCols, __nv_bfloat16>(s_floats);
    } else {
      load_elements<kCols, __half>(s_floats);
    }
  }

  template <int kCols>
  static FA_DEVICE int offset(int row, int col) {
    constexpr int kUnit = device::kBlockCols;
    return row * kCols + (col / kUnit ^ row % (kCols / kUnit)) * kUnit + col % kUnit;
  }

 private:
  template <typename Scores, int kAtOnce, typename Element>
  FA_DEVICE void load_elements_of_lane(float* s_lane) const {
    const ScoreTensor& bias = rules.bias;
    const Element* g_head = bias.of_head<const Element>(batch, head);
#pragma unroll kAtOnce
    for (int i = 0; i < 4 * Scores::kColBlocks; ++i) {
      const int key = min(first_key + Scores::row(i / 2 % 2), end_key - 1);
      const int query = min(first_query + Scores::col(i / 4, i), end_query - 1);
      s_lane[i * ptx::kWarpSize] = device::to_float(__ldg(g_head + bias.offset(query, key)));
    }
  }

  template <int kCols, typename Element>
  FA_DEVICE void load_elements(float* s_floats) const {
    const ScoreTensor& bias = rules.bias;
    const Element* g_head = bias.of_head<const Element>(batch, head);
#pragma unroll 4
    for (int i = ptx::lane_index(); i < device::kBlockRows * kCols; i += ptx::kWarpSize) {
      const int row = i / kCols;
      const int query = min(first_query + row, end_query - 1);
      const int key = min(first_key + i % kCols, end_key - 1);
      s_floats[offset<kCols>(row, i % kCols)] = device::to_float(g_head[bias.offset(query, key)]);
    }
  }
};

// Through the shared memory of a warp that has room for half of its bias as floats.
template <typename Scores>
FA_DEVICE void add_bias(Scores& r_scores, float scale, float* s_floats, BiasPart part) {
  constexpr int kCols = Scores::kCols / 2;
#pragma unroll
  for (int first = 0; first < Scores::kCols; first += kCols) {
    __syncwarp();  // all have read what is there
    part.load<kCols>(s_floats);
    __syncwarp();
#pragma unroll
    for (int col = 0; col < kCols; col += device::kBlockCols) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 bias = *reinterpret_cast<const float2*>(
            s_floats + BiasPart::offset<kCols>(Scores::row(half), col + Scores::col(0, 0)));
        float* r_pair = &r_scores.r[0][(first + col) / device::kBlockCols][2 * half];
        r_pair[0] = fmaf(r_pair[0], scale, bias.x);
        r_pair[1] = fmaf(r_pair[1], scale, bias.y);
      }
    }
    part.first_key += kCols;
  }
}

// Transposed, by a lane whose elements lie as BiasPart::load_of_lane() leaves them.
template <typename Scores>
FA_DEVICE void add_bias_of_lane(Scores& r_scores, float scale, const float* s_lane) {
#pragma unroll
  for (int i = 0; i < 4 * Scores::kColBlocks; ++i) {
    float& score = r_scores.r[0][i / 4][i % 4];
    score = fmaf(score, scale, s_lane[i * ptx::kWarpSize]);
  }
}

}  // namespace fa::sm90
