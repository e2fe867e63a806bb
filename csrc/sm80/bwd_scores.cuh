// SPDX-License-Identifier: BSD-3-Clause
// From shared tiles to probabilities and gradients of scores, which backward needs twice: for dq,
// dk and dv, and for the gradient of a bias.
#pragma once

#include "device/warp_mma.cuh"
#include "sm80/traits.h"

namespace fa::sm80 {

// A tile's statistics are contiguous in global memory, lse first.
template <int kThreads, typename Statistics>
FA_DEVICE void load_statistics(Statistics& s_statistics, const float* g_statistics) {
  constexpr int kFloatsPerCopy = ptx::kCpAsyncBytes / sizeof(float);
  constexpr int kCopies = sizeof(Statistics) / ptx::kCpAsyncBytes;
  static_assert(kCopies <= kThreads);
  const int first = static_cast<int>(threadIdx.x) * kFloatsPerCopy;
  if (threadIdx.x < kCopies) {
    ptx::cp_async_16(s_statistics.lse_log2 + first, g_statistics + first);
  }
}

// A warp's share of p and ds, by ScoreGrid, of the tile `at` of queries and a tile of keys.
// sees_all(): whether by the window every query sees every key.
template <typename Traits, typename SeesAll>
FA_DEVICE void find_scores(const BwdParams& params, const typename Traits::Rules& rules,
                           const typename Traits::SharedMemory& s, int stage, const QueryTile& at,
                           int key_tile, SeesAll&& sees_all, typename Traits::ScoreGrid::Sum& r_p,
                           typename Traits::ScoreGrid::Sum& r_ds) {
  using Sum = typename Traits::ScoreGrid::Sum;
  const float scale_log2 = static_cast<float>(params.softmax_scale) * kLog2E;
  const auto& s_statistics = s.statistics[stage];
  const int first_query = at.tile * Traits::kTileM;
  const int first_key = key_tile * Traits::kTileN;
  const int row = Traits::ScoreGrid::row();
  const int col = Traits::ScoreGrid::col();

  r_p.clear();
  device::accumulate_abt(r_p, s.queries[stage].q, row, s.k, col);
  r_p.transform([&](float score, int i, int, int) {
    const float lse_log2 = s_statistics.lse_log2[row + Sum::row(i)];
    return ptx::exp2_approx(fmaf(score, scale_log2, -lse_log2));
  });
  const bool is_masked = rules.is_masked(at, key_tile, sees_all());
  const typename Traits::Rules::template Seen<Sum> seen;
  if (is_masked) {
    rules.keep_seen(r_p, seen, first_query + row, first_key + col, 0.0f);
  }

  r_ds.clear();  // dp, then ds
  device::accumulate_abt(r_ds, s.queries[stage].dout, row, s.v, col);
  r_ds.transform([&](float dp, int i, int block, int j) {
    const float delta = s_statistics.delta[row + Sum::row(i)];
    return r_p.r[i / 2][block][j] * (dp - delta);
  });
  if (is_masked) {  // dp of a hidden key may be infinite
    rules.keep_seen(r_ds, seen, first_query + row, first_key + col, 0.0f);
  }
}

// Of what ds is the gradient: of scores, as a bias needs it; or of softmax_scale * q k^T, which a
// softcap makes scores of, as q and k need it.
enum class GradientOf { kScores, kProducts };

// The same under all rules. dp comes first, so that what p is multiplied by for ds takes its place
// and no registers of its own. p is what dropout leaves of it, not scaled.
template <typename Traits, GradientOf kGradientOf>
FA_DEVICE void find_general_scores(const BwdParams& params, const typename Traits::Rules& rules,
                                   const typename Traits::SharedMemory& s, int stage,
                                   const QueryTile& at, int key_tile,
                                   typename Traits::ScoreGrid::Sum& r_p,
                                   typename Traits::ScoreGrid::Sum& r_ds) {
  using Sum = typename Traits::ScoreGrid::Sum;
  const auto& s_statistics = s.statistics[stage];
  const int row = Traits::ScoreGrid::row();
  const int col = Traits::ScoreGrid::col();
  const int query = at.tile * Traits::kTileM + row;
  // What depends on keys alone would be kept in registers from tile to tile.
  const int key = static_cast<int>(ptx::opaque(key_tile * Traits::kTileN + col));

  r_ds.clear();
  device::accumulate_abt(r_ds, s.queries[stage].dout, row, s.v, col);
  device::Kept<Sum> kept;
  rules.drop_gradients(r_ds, kept, at.head, query, key);
  r_ds.transform(
      [&](float dp, int i, int, int) { return dp - s_statistics.delta[row + Sum::row(i)]; });

  r_p.clear();
  device::accumulate_abt(r_p, s.queries[stage].q, row, s.k, col);
  rules.finish_scores(r_p, at.head, query, key, [&](float tanh, int i, int block, int j) {
    if constexpr (kGradientOf == GradientOf::kProducts) {
      r_ds.r[i / 2][block][j] *= fmaf(-tanh, tanh, 1.0f);
    }
  });
  r_p.transform([&](float score, int i, int, int) {
    return ptx::exp2_approx(fmaf(score, kLog2E, -s_statistics.lse_log2[row + Sum::row(i)]));
  });
  r_ds.transform(
      [&](float factor, int i, int block, int j) { return r_p.r[i / 2][block][j] * factor; });
  if (rules.is_masked(at, key_tile, false)) {
    typename Traits::Rules::template Seen<Sum> seen;
    rules.find_seen(seen, at.head, query, key);
    rules.keep_seen(r_p, seen, query, key, 0.0f);
    rules.keep_seen(r_ds, seen, query, key, 0.0f);  // dp of a hidden key may be infinite
  }
  rules.drop_again(r_p, kept);
}

}  // namespace fa::sm80
