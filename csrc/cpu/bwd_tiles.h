// SPDX-License-Identifier: BSD-3-Clause
// The steps of the backward pass for a tile of queries and a tile of keys; see cpu/bwd.h.
#pragma once

#include <cstdint>

#include "cpu/rules.h"
#include "cpu/tile.h"

namespace fa::cpu::FA_CPU_ISA {

// As in the forward pass, scores and all that has their shape are held transposed, (keys, queries).
template <Dtype kDtype, int kTileM, int kTileN>
class BwdTiles {
 public:
  using Element = typename ElementOf<kDtype>::Element;
  using Real = typename ElementOf<kDtype>::Real;
  static_assert(kTileM % kBlockColumns<Real> == 0);

  explicit BwdTiles(const BwdParams& params)
      : params_(params),
        head_dim_(params.shape.head_dim),
        head_dim_v_(params.shape.head_dim_v),
        scale_(static_cast<Real>(params.softmax_scale)),
        q_(kTileM, head_dim_),
        dout_(kTileM, head_dim_v_),
        q_transposed_(head_dim_, kTileM),
        dout_transposed_(head_dim_v_, kTileM),
        k_(kTileN, head_dim_),
        v_(kTileN, head_dim_v_),
        p_(kTileN, kTileM),
        ds_(kTileN, kTileM),
        dq_(kTileM, head_dim_),
        rules_(params.rules),
        terms_(params.rules.terms, params.shape.num_heads) {}

  // window: of the sequences that both the queries and the keys belong to.
  void set_queries(const PrefixWindow& window, const Rows& rows) {
    queries_ = rows;
    rules_.set_queries(window, rows);
  }
  void set_keys(const Rows& rows) { keys_ = rows; }

  // Whether some of the queries may see some of the keys. To be asked of each pair of tiles before
  // its scores are computed.
  bool any_seen() { return rules_.any_seen(keys_.range); }

  void load_queries() {
    const int queries = queries_.range.size();
    load_rows<Element>(params_.q, queries_, head_dim_, scale_, q_.tile());
    load_rows<Element>(params_.dout, queries_, head_dim_v_, Real{1}, dout_.tile());
    transpose(q_.tile(), queries, head_dim_, q_transposed_.tile());
    transpose(dout_.tile(), queries, head_dim_v_, dout_transposed_.tile());

    const int64_t first = queries_.first();
    const Real* lse = params_.softmax_lse.row<Real>(queries_.batch, queries_.head) + first;
    const Real* delta = params_.delta.row<Real>(queries_.batch, queries_.head) + first;
    for (int query = 0; query < kTileM; ++query) {
      // A query that sees no key, and one past the end: exp(score - inf) is 0 for any score.
      const bool sees_keys = query < queries && lse[query] != -kInfinity<Real>;
      lse_[query] = sees_keys ? lse[query] : kInfinity<Real>;
      delta_[query] = sees_keys ? delta[query] : 0;  // else what reaches its LSE may be NaN
    }
  }

  void load_keys() {
    load_rows<Element>(params_.k, keys_, head_dim_, Real{1}, k_.tile());
    load_rows<Element>(params_.v, keys_, head_dim_v_, Real{1}, v_.tile());
  }

  // P, as dV takes it, and dS of the loaded tiles, for bias and slopes.
  void compute_p_and_ds() {
    const int columns = padded<Real>(queries_.range.size());
    const Tile<Real> p = p_.tile();
    const Tile<Real> ds = ds_.tile();
    const int keys = keys_.range.size();
    multiply<Lhs::kPlain, Result::kOverwrite>(keys, columns, head_dim_, k_.tile(),
                                              q_transposed_.tile(), p);
    multiply<Lhs::kPlain, Result::kOverwrite>(keys, columns, head_dim_v_, v_.tile(),
                                              dout_transposed_.tile(), ds);
    if (terms_.has_softcap()) {
      terms_.cap_for_gradient(keys, columns, p);
    }
    rules_.apply(columns, p);
    if (terms_.has_dropout()) {
      terms_.drop(queries_, keys_.range, columns, ds);  // dP
    }
    rules_.clear_hidden(columns, ds);  // may be inf, and 0 * inf is NaN
    for (int key = 0; key < keys; ++key) {
      for (int query = 0; query < columns; query += kLanes<Real>) {
        Real* p_lanes = p.row(key) + query;
        Real* ds_lanes = ds.row(key) + query;
        const Vec<Real> probability = exp<Real>(load(p_lanes) - load(lse_ + query));
        store(p_lanes, probability);
        const Vec<Real> ds_of_visible = probability * (load(ds_lanes) - load(delta_ + query));
        store(ds_lanes, probability == Vec<Real>{} ? Vec<Real>{} : ds_of_visible);
      }
    }
    if (terms_.has_dropout()) {
      terms_.drop_again(keys, columns, p);
    }
  }

  // The gradient of the queries' slope, as far as these tiles go.
  Real sum_for_slope() const {
    return rules_.sum_for_slope(padded<Real>(queries_.range.size()), ds_.tile());
  }

  // dS becomes the gradient of Q K^T and no more that of the scores, for dQ and dK.
  void pass_cap() {
    if (terms_.has_softcap()) {
      terms_.pass_cap(keys_.range.size(), padded<Real>(queries_.range.size()), ds_.tile());
    }
  }

  void clear_dq() { fill_rows<Real>(dq_.tile(), queries_.range.size(), head_dim_, 0); }

  void add_dq() {
    multiply<Lhs::kTransposed, Result::kAddTo>(queries_.range.size(), padded<Real>(head_dim_),
                                               keys_.range.size(), ds_.tile(), k_.tile(),
                                               dq_.tile());
  }

  void store_dq() {
    store_rows<Element>(
        dq_.tile(), queries_, head_dim_, [this](int) { return scale_; }, params_.dq);
  }

  // dk (keys, head_dim), dv (keys, head_dim_v). The loaded queries carry the scale, and so does dk.
  void add_dk_dv(Tile<Real> dk, Tile<Real> dv) {
    const int queries = queries_.range.size();
    const int keys = keys_.range.size();
    multiply<Lhs::kPlain, Result::kAddTo>(keys, padded<Real>(head_dim_v_), queries, p_.tile(),
                                          dout_.tile(), dv);
    multiply<Lhs::kPlain, Result::kAddTo>(keys, padded<Real>(head_dim_), queries, ds_.tile(),
                                          q_.tile(), dk);
  }

  void store_dk_dv(const Rows& rows, Tile<Real> dk, Tile<Real> dv) {
    const auto one = [](int) { return Real{1}; };
    store_rows<Element>(dk, rows, head_dim_, one, params_.dk);
    store_rows<Element>(dv, rows, head_dim_v_, one, params_.dv);
  }

  // sums (keys, queries) of a bias's gradient.
  void add_ds(Tile<Real> sums) const {
    for (int key = 0; key < keys_.range.size(); ++key) {
      const Real* ds = ds_.tile().row(key);
      Real* line = sums.row(key);
      for (int query = 0; query < padded<Real>(queries_.range.size()); query += kLanes<Real>) {
        store(line + query, load(line + query) + load(ds + query));
      }
    }
  }

 private:
  const BwdParams& params_;
  int head_dim_;
  int head_dim_v_;
  Real scale_;
  Rows queries_{};
  Rows keys_{};
  TileBuffer<Real> q_, dout_;                        // (queries, head_dim(_v)); q times the scale
  TileBuffer<Real> q_transposed_, dout_transposed_;  // (head_dim(_v), queries)
  TileBuffer<Real> k_, v_;                           // (keys, head_dim(_v))
  TileBuffer<Real> p_, ds_;                          // (keys, queries)
  TileBuffer<Real> dq_;                              // (queries, head_dim)
  TileRules<Real, kTileM, kTileN> rules_;
  TileTerms<Real, kTileM, kTileN> terms_;
  alignas(kCacheLine) Real lse_[kTileM];
  alignas(kCacheLine) Real delta_[kTileM];
};

}  // namespace fa::cpu::FA_CPU_ISA
