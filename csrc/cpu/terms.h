// SPDX-License-Identifier: BSD-3-Clause
// What softcap, ALiBi and dropout (common/score_terms.h) make of a tile of scores or probabilities,
// which are held transposed, (keys, queries).
#pragma once

#include <cstdint>

#include "common/score_terms.h"
#include "cpu/tile.h"

namespace fa::cpu::FA_CPU_ISA {

template <typename Real, int kTileM, int kTileN>
class TileTerms {
 public:
  TileTerms(const ScoreTerms& terms, int num_heads)
      : terms_(terms),
        num_heads_(num_heads),
        derivatives_(terms.softcap != 0 ? kTileN : 0, kTileM),
        kept_(terms.dropout.any() ? kTileN : 0, kTileM) {}

  bool has_softcap() const { return terms_.softcap != 0; }
  bool has_dropout() const { return terms_.dropout.any(); }

  // Products of queries and keys become capped scores.
  void cap(int keys, int columns, Tile<Real> scores) const {
    for_each_vector(keys, columns, scores, [this](Vec<Real> tanh_of_score, int, int) {
      return tanh_of_score * static_cast<Real>(terms_.softcap);
    });
  }

  // The same, and what pass_cap() needs is kept.
  void cap_for_gradient(int keys, int columns, Tile<Real> scores) {
    for_each_vector(keys, columns, scores, [this](Vec<Real> tanh_of_score, int key, int query) {
      store(derivatives_.tile().row(key) + query, 1 - tanh_of_score * tanh_of_score);
      return tanh_of_score * static_cast<Real>(terms_.softcap);
    });
  }

  // The gradient of capped scores becomes that of products.
  void pass_cap(int keys, int columns, Tile<Real> ds) const {
    for (int key = 0; key < keys; ++key) {
      for (int query = 0; query < columns; query += kLanes<Real>) {
        Real* lanes = ds.row(key) + query;
        store(lanes, load(lanes) * load(derivatives_.tile().row(key) + query));
      }
    }
  }

  // Drops probabilities (or dP, which has the same pattern), and scales those that are kept.
  void drop(const Rows& queries, Range keys, int columns, Tile<Real> p) {
    find_kept(queries, keys, columns);
    drop_again(keys.size(), columns, p);
  }

  // The same pairs of another tile.
  void drop_again(int keys, int columns, Tile<Real> p) const {
    for (int key = 0; key < keys; ++key) {
      for (int query = 0; query < columns; query += kLanes<Real>) {
        const Vec<Real> kept = load(kept_.tile().row(key) + query);
        const Vec<Real> scaled = load(p.row(key) + query) * kept;
        store(p.row(key) + query, kept == Vec<Real>{} ? Vec<Real>{} : scaled);
      }
    }
  }

 private:
  // kept_ (keys, queries): by what dropout multiplies each probability, 0 or 1 / P(keep).
  void find_kept(const Rows& queries, Range keys, int columns) {
    const DropoutOfHead dropout(terms_.dropout, queries.batch, queries.head, num_heads_);
    const Range rows = {queries.range.begin, queries.range.begin + columns};
    const auto scale = static_cast<Real>(terms_.dropout.scale);
    const auto next_patch = [](int row) { return row + (row % 8 == 6 ? 10 : 2); };
    for (int key = keys.begin / 16 * 16; key < keys.end; key = next_patch(key)) {
      for (int query = rows.begin / 16 * 16; query < rows.end; query = next_patch(query)) {
        const DropoutPatch patch = dropout.patch(query, key);
        for (int pair = 0; pair < 16; ++pair) {
          const int row = query + pair / 4 % 2 * 8 + pair / 2 % 2 - rows.begin;
          const int column = key + pair / 8 * 8 + pair % 2 - keys.begin;
          if (row >= 0 && row < columns && column >= 0 && column < keys.size()) {
            const uint32_t number = patch.number(pair / 4, pair % 4);
            kept_.tile().row(column)[row] = dropout.keeps(number) ? scale : 0;
          }
        }
      }
    }
  }

  // scores = finish(tanh(scores / softcap), key, query), a vector at a time.
  template <typename Finish>
  FA_CPU_INLINE void for_each_vector(int keys, int columns, Tile<Real> scores,
                                     const Finish& finish) const {
    const Real inverse = static_cast<Real>(1 / terms_.softcap);
    for (int key = 0; key < keys; ++key) {
      for (int query = 0; query < columns; query += kLanes<Real>) {
        Real* lanes = scores.row(key) + query;
        store(lanes, finish(tanh<Real>(load(lanes) * inverse), key, query));
      }
    }
  }

  const ScoreTerms& terms_;
  int num_heads_;
  TileBuffer<Real> derivatives_;  // of capped scores
  TileBuffer<Real> kept_;
};

// Where the queries of a tile lie, for ALiBi: distances to a key as alibi_distance() tells them.
template <typename Real, int kTileM>
class AlibiDistances {
 public:
  void set(const WindowMask& window, Range queries) {
    for (int query = 0; query < kTileM; ++query) {
      aligned_key_[query] = static_cast<Real>(queries.begin + query + window.offset());
    }
  }

  FA_CPU_INLINE Vec<Real> at(int key, int query) const {
    const Vec<Real> distance = static_cast<Real>(key) - load(aligned_key_ + query);
    return distance < Vec<Real>{} ? distance : -distance;
  }

 private:
  alignas(kCacheLine) Real aligned_key_[kTileM];
};

// The second step of a gradient: partial sums, each of a tile of queries, into one number for each
// head or for each head of each batch entry, in the order of batch entries and tiles.
template <typename Real, typename Params>
void sum_tiles(const HeadGradient& gradient, const Params& params, int tile_m) {
  const Shape& shape = params.shape;
  for (int head = 0; head < shape.num_heads; ++head) {
    double sum = 0;
    for (int batch = 0; batch < shape.batch; ++batch) {
      const int64_t first = params.queries.first_tile(batch, shape.seqlen_q, tile_m);
      const int length = params.queries.at(batch, shape.seqlen_q).length;
      for (int tile = 0; tile < ceil_div(length, tile_m); ++tile) {
        sum += gradient.at<Real>(head, first + tile);
      }
      gradient.sums.at<Real>(batch, head) = static_cast<Real>(sum);
      if (gradient.sums.batch_stride != 0) {
        sum = 0;
      }
    }
  }
}

}  // namespace fa::cpu::FA_CPU_ISA
