// SPDX-License-Identifier: BSD-3-Clause
// Backward pass. P comes back from the saved softmax_lse, tile by tile:
//   P = exp(scale Q K^T - lse),  dP = dO V^T,  dS = P (dP - delta),  delta = rowsum(dO O) - dlse
//   dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K
// With enough heads a task is one head of keys and values: five products per pair of tiles, dK and
// dV summed in scratch of the length of the keys. With few heads, dK and dV and then dQ are tasks
// of one tile each, and compute P and dP twice: seven products, but as many tasks as tiles. The
// gradient of a bias (dS itself) takes two more; those of slopes are summed beside dQ, and those of
// sinks, - exp(sink - lse) delta, beside delta.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/scheduler.h"
#include "cpu/bwd_tiles.h"
#include "cpu/dbias.h"
#include "cpu/parallel.h"

namespace fa::cpu::FA_CPU_ISA {

// From this many heads of keys and values in the batch on, tasks are whole heads.
inline constexpr int64_t kManyHeads = 16;

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
    if (params_.dbias.data != nullptr) {
      BiasGradient<kDtype, kTileM, kTileN>(params_, context_).run();
    }
    for (const HeadGradient* gradient : {&params_.dslopes, &params_.dsinks}) {
      if (gradient->sums.data != nullptr) {
        sum_tiles<Real>(*gradient, params_, kTileM);
      }
    }
  }

 private:
  void compute_delta() const {
    const TileScheduler scheduler = {query_tiles_, shape_.num_heads, shape_.batch};
    parallel_for(context_, scheduler.count(), [&](int64_t begin, int64_t end) {
      const TileBuffer<Real> out(kTileM, shape_.head_dim_v);
      const TileBuffer<Real> dout(kTileM, shape_.head_dim_v);
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
    load_rows<Element>(params_.out, rows, shape_.head_dim_v, Real{1}, out);
    load_rows<Element>(params_.dout, rows, shape_.head_dim_v, Real{1}, dout);
    Real* delta = params_.delta.row<Real>(rows.batch, rows.head) + rows.first();
    for (int query = 0; query < rows.range.size(); ++query) {
      Vec<Real> sum = {};
      for (int column = 0; column < padded<Real>(shape_.head_dim_v); column += kLanes<Real>) {
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
    if (params_.dsinks.sums.data != nullptr) {
      params_.dsinks.at<Real>(rows.head, number_of(rows)) = sum_for_sink(rows, delta);
    }
  }

  Real sum_for_sink(const Rows& rows, const Real* delta) const {
    const Real* lse = params_.softmax_lse.row<Real>(rows.batch, rows.head) + rows.first();
    const Real sink = params_.rules.terms.sinks.at<const Real>(0, rows.head);
    Real sum = 0;
    if (sink != -kInfinity<Real>) {
      for (int query = 0; query < rows.range.size(); ++query) {
        sum -= std::exp(sink - lse[query]) * delta[query];
      }
    }
    return sum;
  }

  void run_by_heads() const {
    const TileScheduler scheduler = {1, shape_.num_heads_kv, shape_.batch};
    parallel_for(context_, scheduler.count(), [&](int64_t begin, int64_t end) {
      Tiles tiles(params_);
      const TileBuffer<Real> dk(shape_.seqlen_k, shape_.head_dim);
      const TileBuffer<Real> dv(shape_.seqlen_k, shape_.head_dim_v);
      const auto add_dk_dv = [&](int key) { tiles.add_dk_dv(dk.tile(key), dv.tile(key)); };
      for (int64_t index = begin; index < end; ++index) {
        const WorkTile work = scheduler.at(index);
        const SequencePair sequences(params_, work.batch);
        const int seqlen_k = sequences.keys.length;
        fill_rows<Real>(dk.tile(), seqlen_k, shape_.head_dim, 0);
        fill_rows<Real>(dv.tile(), seqlen_k, shape_.head_dim_v, 0);
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
      const TileBuffer<Real> dv(kTileN, shape_.head_dim_v);
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
    fill_rows<Real>(dv, rows.range.size(), shape_.head_dim_v, 0);
    tiles.set_keys(rows);
    tiles.load_keys();
    const Range seeing = sequences.window.queries_seeing_any(rows.range);
    for (int head = first_head(rows.head); head < first_head(rows.head + 1); ++head) {
      for (int query = first_of_walk(params_.rules, seeing, kTileM); query < seeing.end;
           query += kTileM) {
        const Range range = {query, min(query + kTileM, seeing.end)};
        tiles.set_queries(sequences.window, {rows.batch, head, sequences.queries, range});
        if (tiles.any_seen()) {
          tiles.load_queries();
          tiles.compute_p_and_ds();
          tiles.pass_cap();
          tiles.add_dk_dv(dk, dv);
        }
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
    tiles.set_queries(sequences.window, rows);
    tiles.load_queries();
    tiles.clear_dq();
    Real of_slope = 0;
    const Range seen = sequences.window.keys_seen_by_any(rows.range);
    for (int key = first_of_walk(params_.rules, seen, kTileN); key < seen.end; key += kTileN) {
      const Range range = {key, min(key + kTileN, seen.end)};
      tiles.set_keys({rows.batch, head_kv(rows.head), sequences.keys, range});
      if (tiles.any_seen()) {
        tiles.load_keys();
        tiles.compute_p_and_ds();
        if (params_.dslopes.sums.data != nullptr) {
          of_slope += tiles.sum_for_slope();
        }
        tiles.pass_cap();
        tiles.add_dq();
        add_more(key);
      }
    }
    if (params_.dslopes.sums.data != nullptr) {
      params_.dslopes.at<Real>(rows.head, number_of(rows)) = of_slope;
    }
    tiles.store_dq();
  }

  // Of a tile of queries, through the batch.
  int64_t number_of(const Rows& rows) const {
    return params_.queries.first_tile(rows.batch, shape_.seqlen_q, kTileM) +
           rows.range.begin / kTileM;
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
