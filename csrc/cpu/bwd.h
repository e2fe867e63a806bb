// SPDX-License-Identifier: BSD-3-Clause
// Backward pass. P comes back from the saved softmax_lse, tile by tile:
//   P = exp(scale Q K^T - lse),  dP = dO V^T,  dS = P (dP - delta),  delta = rowsum(dO O) - dlse
//   dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K
// With enough heads a task is one head of keys and values: five products per pair of tiles, dK and
// dV summed in scratch of the length of the keys. With few heads, dK and dV and then dQ are tasks
// of one tile each, and compute P and dP twice: seven products, but as many tasks as tiles.
#pragma once

#include <cstdint>

#include "common/scheduler.h"
#include "cpu/mask.h"
#include "cpu/parallel.h"
#include "cpu/tile.h"

namespace fa::cpu::FA_CPU_ISA {

// From this many heads of keys and values in the batch on, tasks are whole heads.
inline constexpr int64_t kManyHeads = 16;

// The steps for a tile of queries and a tile of keys. As in the forward pass, scores and all that
// has their shape are held transposed, (keys, queries).
template <Dtype kDtype, int kTileM, int kTileN>
class BwdTiles {
 public:
  using Element = typename ElementOf<kDtype>::Element;
  using Real = typename ElementOf<kDtype>::Real;
  static_assert(kTileM % kBlockColumns<Real> == 0);

  explicit BwdTiles(const BwdParams& params)
      : params_(params),
        window_(params.window),
        head_dim_(params.shape.head_dim),
        scale_(static_cast<Real>(params.softmax_scale)),
        q_(kTileM, head_dim_),
        dout_(kTileM, head_dim_),
        q_transposed_(head_dim_, kTileM),
        dout_transposed_(head_dim_, kTileM),
        k_(kTileN, head_dim_),
        v_(kTileN, head_dim_),
        p_(kTileN, kTileM),
        ds_(kTileN, kTileM),
        dq_(kTileM, head_dim_) {}

  // window: of the sequences that both the queries and the keys belong to.
  void load_queries(const WindowMask& window, const Rows& rows) {
    window_ = window;
    queries_ = rows;
    const int queries = rows.range.size();
    load_rows<Element>(params_.q, rows, head_dim_, scale_, q_.tile());
    load_rows<Element>(params_.dout, rows, head_dim_, Real{1}, dout_.tile());
    transpose(q_.tile(), queries, head_dim_, q_transposed_.tile());
    transpose(dout_.tile(), queries, head_dim_, dout_transposed_.tile());
    visible_keys_.set(window, rows.range);

    const Real* lse = params_.softmax_lse.row<Real>(rows.batch, rows.head) + rows.first();
    const Real* delta = params_.delta.row<Real>(rows.batch, rows.head) + rows.first();
    for (int query = 0; query < kTileM; ++query) {
      // A query that sees no key, and one past the end: exp(score - inf) is 0 for any score.
      const bool sees_keys = query < queries && lse[query] != -kInfinity<Real>;
      lse_[query] = sees_keys ? lse[query] : kInfinity<Real>;
      delta_[query] = sees_keys ? delta[query] : 0;  // else what reaches its LSE may be NaN
    }
  }

  void load_keys(const Rows& rows) {
    keys_ = rows.range;
    load_rows<Element>(params_.k, rows, head_dim_, Real{1}, k_.tile());
    load_rows<Element>(params_.v, rows, head_dim_, Real{1}, v_.tile());
  }

  // P and dS of the loaded tiles.
  void compute_p_and_ds() {
    const int columns = padded<Real>(queries_.range.size());
    const Tile<Real> p = p_.tile();
    const Tile<Real> ds = ds_.tile();
    multiply<Lhs::kPlain, Result::kOverwrite>(keys_.size(), columns, head_dim_, k_.tile(),
                                              q_transposed_.tile(), p);
    multiply<Lhs::kPlain, Result::kOverwrite>(keys_.size(), columns, head_dim_, v_.tile(),
                                              dout_transposed_.tile(), ds);
    if (needs_mask(window_, queries_.range, keys_)) {
      visible_keys_.hide(keys_, columns, -kInfinity<Real>, p);
      visible_keys_.hide(keys_, columns, 0, ds);  // may be inf, and 0 * inf is NaN
    }
    for (int key = 0; key < keys_.size(); ++key) {
      for (int query = 0; query < columns; query += kLanes<Real>) {
        Real* p_lanes = p.row(key) + query;
        Real* ds_lanes = ds.row(key) + query;
        const Vec<Real> probability = exp<Real>(load(p_lanes) - load(lse_ + query));
        store(p_lanes, probability);
        const Vec<Real> ds_of_visible = probability * (load(ds_lanes) - load(delta_ + query));
        store(ds_lanes, probability == Vec<Real>{} ? Vec<Real>{} : ds_of_visible);
      }
    }
  }

  void clear_dq() { fill_rows<Real>(dq_.tile(), queries_.range.size(), head_dim_, 0); }

  void add_dq() {
    multiply<Lhs::kTransposed, Result::kAddTo>(queries_.range.size(), padded<Real>(head_dim_),
                                               keys_.size(), ds_.tile(), k_.tile(), dq_.tile());
  }

  void store_dq() {
    store_rows<Element>(
        dq_.tile(), queries_, head_dim_, [this](int) { return scale_; }, params_.dq);
  }

  // dk, dv: (keys, head_dim). The loaded queries carry the scale, and so does dk.
  void add_dk_dv(Tile<Real> dk, Tile<Real> dv) {
    const int queries = queries_.range.size();
    multiply<Lhs::kPlain, Result::kAddTo>(keys_.size(), padded<Real>(head_dim_), queries, p_.tile(),
                                          dout_.tile(), dv);
    multiply<Lhs::kPlain, Result::kAddTo>(keys_.size(), padded<Real>(head_dim_), queries,
                                          ds_.tile(), q_.tile(), dk);
  }

  void store_dk_dv(const Rows& rows, Tile<Real> dk, Tile<Real> dv) {
    const auto one = [](int) { return Real{1}; };
    store_rows<Element>(dk, rows, head_dim_, one, params_.dk);
    store_rows<Element>(dv, rows, head_dim_, one, params_.dv);
  }

 private:
  const BwdParams& params_;
  WindowMask window_;
  int head_dim_;
  Real scale_;
  Rows queries_{};
  Range keys_{};
  TileBuffer<Real> q_, dout_;                        // (queries, head_dim); q times the scale
  TileBuffer<Real> q_transposed_, dout_transposed_;  // (head_dim, queries)
  TileBuffer<Real> k_, v_;                           // (keys, head_dim)
  TileBuffer<Real> p_, ds_;                          // (keys, queries)
  TileBuffer<Real> dq_;                              // (queries, head_dim)
  VisibleKeys<Real, kTileM> visible_keys_;
  alignas(kCacheLine) Real lse_[kTileM];
  alignas(kCacheLine) Real delta_[kTileM];
};

template <Dtype kDtype, int kTileM, int kTileN>
class Backward {
  using Tiles = BwdTiles<kDtype, kTileM, kTileN>;
  using Element = typename Tiles::Element;
  using Real = typename Tiles::Real;

 public:
  Backward(const BwdParams& params, const LaunchContext& context)
      : params_(params),
        context_(context),
        shape_(params.shape),
        query_tiles_(ceil_div(shape_.seqlen_q, kTileM)),
        key_tiles_(ceil_div(shape_.seqlen_k, kTileN)) {}

  void run() const {
    compute_delta();
    if (int64_t{shape_.batch} * shape_.num_heads_kv >= kManyHeads) {
      run_by_heads();
    } else {
      run_dk_dv_by_tiles();
      run_dq_by_tiles();
    }
  }

 private:
  void compute_delta() const {
    const TileScheduler scheduler = {query_tiles_, shape_.num_heads, shape_.batch};
    parallel_for(context_, scheduler.count(), [&](int64_t begin, int64_t end) {
      const TileBuffer<Real> out(kTileM, shape_.head_dim);
      const TileBuffer<Real> dout(kTileM, shape_.head_dim);
      for (int64_t index = begin; index < end; ++index) {
        const WorkTile work = scheduler.at(index);
        const Sequence queries = params_.queries.at(work.batch, shape_.seqlen_q);
        const Range range = tile_range(work.tile, kTileM, queries.length);
        if (!range.empty()) {
          compute_delta({work.batch, work.head, queries, range}, out.tile(), dout.tile());
        }
      }
    });
  }

  void compute_delta(const Rows& rows, Tile<Real> out, Tile<Real> dout) const {
    load_rows<Element>(params_.out, rows, shape_.head_dim, Real{1}, out);
    load_rows<Element>(params_.dout, rows, shape_.head_dim, Real{1}, dout);
    Real* delta = params_.delta.row<Real>(rows.batch, rows.head) + rows.first();
    for (int query = 0; query < rows.range.size(); ++query) {
      Vec<Real> sum = {};
      for (int column = 0; column < padded<Real>(shape_.head_dim); column += kLanes<Real>) {
        sum += load(out.row(query) + column) * load(dout.row(query) + column);
      }
      delta[query] = sum_of_lanes<Real>(sum);
    }
    if (params_.dlse.data != nullptr) {
      const Real* dlse = params_.dlse.row<Real>(rows.batch, rows.head) + rows.first();
      for (int query = 0; query < rows.range.size(); ++query) {
        delta[query] -= dlse[query];
      }
    }
  }

  void run_by_heads() const {
    const TileScheduler scheduler = {1, shape_.num_heads_kv, shape_.batch};
    parallel_for(context_, scheduler.count(), [&](int64_t begin, int64_t end) {
      Tiles tiles(params_);
      const TileBuffer<Real> dk(shape_.seqlen_k, shape_.head_dim);
      const TileBuffer<Real> dv(shape_.seqlen_k, shape_.head_dim);
      const auto add_dk_dv = [&](int key) { tiles.add_dk_dv(dk.tile(key), dv.tile(key)); };
      for (int64_t index = begin; index < end; ++index) {
        const WorkTile work = scheduler.at(index);
        const SequencePair sequences(params_, work.batch);
        const int seqlen_k = sequences.keys.length;
        fill_rows<Real>(dk.tile(), seqlen_k, shape_.head_dim, 0);
        fill_rows<Real>(dv.tile(), seqlen_k, shape_.head_dim, 0);
        for (int head = first_head(work.head); head < first_head(work.head + 1); ++head) {
          for (int query = 0; query < sequences.queries.length; query += kTileM) {
            const Range range = {query, min(query + kTileM, sequences.queries.length)};
            const Rows rows = {work.batch, head, sequences.queries, range};
            compute_dq(sequences, rows, tiles, add_dk_dv);
          }
        }
        const Rows all_keys = {work.batch, work.head, sequences.keys, {0, seqlen_k}};
        tiles.store_dk_dv(all_keys, dk.tile(), dv.tile());
      }
    });
  }

  void run_dk_dv_by_tiles() const {
    const TileScheduler scheduler = {key_tiles_, shape_.num_heads_kv, shape_.batch};
    parallel_for(context_, scheduler.count(), [&](int64_t begin, int64_t end) {
      Tiles tiles(params_);
      const TileBuffer<Real> dk(kTileN, shape_.head_dim);
      const TileBuffer<Real> dv(kTileN, shape_.head_dim);
      for (int64_t index = begin; index < end; ++index) {
        const WorkTile work = scheduler.at(index);
        const SequencePair sequences(params_, work.batch);
        const Range keys =
            tile_range(balanced(work.tile, key_tiles_), kTileN, sequences.keys.length);
        if (!keys.empty()) {
          const Rows rows = {work.batch, work.head, sequences.keys, keys};
          compute_dk_dv(sequences, rows, tiles, dk.tile(), dv.tile());
        }
      }
    });
  }

  void compute_dk_dv(const SequencePair& sequences, const Rows& rows, Tiles& tiles, Tile<Real> dk,
                     Tile<Real> dv) const {
    fill_rows<Real>(dk, rows.range.size(), shape_.head_dim, 0);
    fill_rows<Real>(dv, rows.range.size(), shape_.head_dim, 0);
    tiles.load_keys(rows);
    const Range seeing = sequences.window.queries_seeing_any(rows.range);
    for (int head = first_head(rows.head); head < first_head(rows.head + 1); ++head) {
      for (int query = seeing.begin; query < seeing.end; query += kTileM) {
        const Range range = {query, min(query + kTileM, seeing.end)};
        tiles.load_queries(sequences.window, {rows.batch, head, sequences.queries, range});
        tiles.compute_p_and_ds();
        tiles.add_dk_dv(dk, dv);
      }
    }
    tiles.store_dk_dv(rows, dk, dv);
  }

  void run_dq_by_tiles() const {
    const TileScheduler scheduler = {query_tiles_, shape_.num_heads, shape_.batch};
    parallel_for(context_, scheduler.count(), [&](int64_t begin, int64_t end) {
      Tiles tiles(params_);
      for (int64_t index = begin; index < end; ++index) {
        const WorkTile work = scheduler.at(index);
        const SequencePair sequences(params_, work.batch);
        const Range queries =
            tile_range(balanced(work.tile, query_tiles_), kTileM, sequences.queries.length);
        if (!queries.empty()) {
          const Rows rows = {work.batch, work.head, sequences.queries, queries};
          compute_dq(sequences, rows, tiles, [](int) {});
        }
      }
    });
  }

  // With dq done for a tile of keys, add_more(first_key) may use its P and dS.
  template <typename AddMore>
  void compute_dq(const SequencePair& sequences, const Rows& rows, Tiles& tiles,
                  const AddMore& add_more) const {
    tiles.load_queries(sequences.window, rows);
    tiles.clear_dq();
    const Range seen = sequences.window.keys_seen_by_any(rows.range);
    for (int key = seen.begin; key < seen.end; key += kTileN) {
      const Range range = {key, min(key + kTileN, seen.end)};
      tiles.load_keys({rows.batch, head_kv(rows.head), sequences.keys, range});
      tiles.compute_p_and_ds();
      tiles.add_dq();
      add_more(key);
    }
    tiles.store_dq();
  }

  int first_head(int head_kv) const { return head_kv * shape_.group_size(); }
  int head_kv(int head) const { return head / shape_.group_size(); }

  const BwdParams& params_;
  const LaunchContext& context_;
  const Shape& shape_;
  const int query_tiles_;  // of the longest sequence
  const int key_tiles_;
};

template <int kRow>
void flash_bwd(const BwdParams& params, const LaunchContext& context) {
  constexpr KernelConfig kConfig = table::kRows[kRow];
  Backward<kConfig.dtype, kConfig.tile_m, kConfig.tile_n>(params, context).run();
}

}  // namespace fa::cpu::FA_CPU_ISA
