// SPDX-License-Identifier: BSD-3-Clause
// Forward pass (FlashAttention-2, Algorithm 1): one task is a tile of queries of one head. It walks
// the keys that its queries see, tile by tile, and keeps a running maximum and sum per query.
//
// Scores are held transposed, (keys, queries): the softmax then works on vectors of queries with no
// reduction inside a vector, and neither product needs anything but the queries transposed.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/scheduler.h"
#include "cpu/parallel.h"
#include "cpu/rules.h"
#include "cpu/tile.h"

namespace fa::cpu::FA_CPU_ISA {

template <typename Real, int kTileM>
class OnlineSoftmax {
 public:
  OnlineSoftmax() {
    for (int query = 0; query < kTileM; ++query) {
      maximum_[query] = -kInfinity<Real>;
      sum_[query] = 0;
    }
  }

  // scores (keys, queries) become exp(scores - maximum).
  void update(int keys, int queries, Tile<Real> scores) {
    for (int query = 0; query < queries; query += kBlockColumns<Real>) {
      update_block(keys, query, {scores.data + query, scores.ld});
    }
  }

  // What the last update made of everything summed before it.
  Real rescale(int query) const { return rescale_[query]; }

  // The largest score so far.
  Real maximum(int query) const { return maximum_[query]; }

  // Once all keys are seen: exp(sink) joins the sums.
  void add_sink(int queries, Real sink) {
    for (int query = 0; query < queries; ++query) {
      const Real before = maximum_[query];
      if (sink == -kInfinity<Real>) {
        rescale_[query] = 1;
        continue;
      }
      maximum_[query] = max(before, sink);
      rescale_[query] = std::exp(before - maximum_[query]);
      sum_[query] = sum_[query] * rescale_[query] + std::exp(sink - maximum_[query]);
    }
  }

  Real inverse_sum(int query) const { return sum_[query] == 0 ? 0 : 1 / sum_[query]; }

  Real lse(int query) const {
    return sum_[query] == 0 ? -kInfinity<Real> : maximum_[query] + std::log(sum_[query]);
  }

 private:
  void update_block(int keys, int query, Tile<Real> scores) {
    Vec<Real> maximum[kBlockVectors];
    Vec<Real> sum[kBlockVectors];
    for (int i = 0; i < kBlockVectors; ++i) {
      maximum[i] = load(maximum_ + query + i * kLanes<Real>);
    }
    for (int key = 0; key < keys; ++key) {
      for (int i = 0; i < kBlockVectors; ++i) {
        const Vec<Real> score = load(scores.row(key) + i * kLanes<Real>);
        maximum[i] = score > maximum[i] ? score : maximum[i];
      }
    }
    for (int i = 0; i < kBlockVectors; ++i) {
      const int lane = query + i * kLanes<Real>;
      const Vec<Real> before = load(maximum_ + lane);
      store(maximum_ + lane, maximum[i]);
      // A query that has seen no key yet: any finite number keeps -inf - maximum from being NaN.
      maximum[i] = maximum[i] == -kInfinity<Real> ? Vec<Real>{} : maximum[i];
      const Vec<Real> rescale = exp<Real>(before - maximum[i]);
      store(rescale_ + lane, rescale);
      sum[i] = load(sum_ + lane) * rescale;
    }
    for (int key = 0; key < keys; ++key) {
      for (int i = 0; i < kBlockVectors; ++i) {
        Real* score = scores.row(key) + i * kLanes<Real>;
        const Vec<Real> p = exp<Real>(load(score) - maximum[i]);
        store(score, p);
        sum[i] += p;
      }
    }
    for (int i = 0; i < kBlockVectors; ++i) {
      store(sum_ + query + i * kLanes<Real>, sum[i]);
    }
  }

  alignas(kCacheLine) Real maximum_[kTileM];
  alignas(kCacheLine) Real sum_[kTileM];
  alignas(kCacheLine) Real rescale_[kTileM];
};

template <Dtype kDtype, int kTileM, int kTileN>
class FwdWorker {
  using Element = typename ElementOf<kDtype>::Element;
  using Real = typename ElementOf<kDtype>::Real;
  static_assert(kTileM % kBlockColumns<Real> == 0);

 public:
  explicit FwdWorker(const FwdParams& params)
      : params_(params),
        rows_(max(kTileM, kTileN), params.shape.head_dim),
        q_transposed_(params.shape.head_dim, kTileM),
        v_(kTileN, params.shape.head_dim_v),
        scores_(kTileN, kTileM),
        out_(kTileM, params.shape.head_dim_v),
        rules_(params.rules),
        terms_(params.rules.terms, params.shape.num_heads) {}

  void run(const WorkTile& work) {
    const Shape& shape = params_.shape;
    const SequencePair sequences(params_, work.batch);
    const Range queries = tile_range(work.tile, kTileM, sequences.queries.length);
    if (queries.empty()) {  // a sequence shorter than the longest
      return;
    }
    const int head_kv = work.head / shape.group_size();
    const Rows query_rows = {work.batch, work.head, sequences.queries, queries};
    const Real scale = static_cast<Real>(params_.softmax_scale);

    const Tile<Real> q = rows_.tile();
    const Tile<Real> q_transposed = q_transposed_.tile();  // (head_dim, queries)
    load_rows<Element>(params_.q, query_rows, shape.head_dim, scale, q);
    transpose(q, queries.size(), shape.head_dim, q_transposed);
    rules_.set_queries(sequences.window, query_rows);
    const Tile<Real> out = out_.tile();  // (queries, head_dim_v)
    fill_rows<Real>(out, queries.size(), shape.head_dim_v, 0);
    OnlineSoftmax<Real, kTileM> softmax;

    const Range seen = sequences.window.keys_seen_by_any(queries);
    for (int first_key = first_of_walk(params_.rules, seen, kTileN); first_key < seen.end;
         first_key += kTileN) {
      const Range keys = {first_key, min(first_key + kTileN, seen.end)};
      if (!rules_.any_seen(keys)) {
        continue;
      }
      const Rows key_rows = {work.batch, head_kv, sequences.keys, keys};
      const Tile<Real> k = rows_.tile();
      const Tile<Real> v = v_.tile();
      const Tile<Real> scores = scores_.tile();  // (keys, queries)
      load_rows<Element>(params_.k, key_rows, shape.head_dim, Real{1}, k);
      load_rows<Element>(params_.v, key_rows, shape.head_dim_v, Real{1}, v);

      const int columns = padded<Real>(queries.size());
      multiply<Lhs::kPlain, Result::kOverwrite>(keys.size(), columns, shape.head_dim, k,
                                                q_transposed, scores);
      if (terms_.has_softcap()) {
        terms_.cap(keys.size(), columns, scores);
      }
      rules_.apply(columns, scores);
      softmax.update(keys.size(), columns, scores);
      if (terms_.has_dropout()) {
        terms_.drop(query_rows, keys, columns, scores);
      }
      rescale_out(softmax, queries.size());
      multiply<Lhs::kTransposed, Result::kAddTo>(queries.size(), padded<Real>(shape.head_dim_v),
                                                 keys.size(), scores, v, out);
    }
    const ScoreTerms& terms = params_.rules.terms;
    if (terms.max_logit.data != nullptr) {
      raise_max_logit(softmax, query_rows);
    }
    if (terms.sinks.data != nullptr) {
      softmax.add_sink(queries.size(), terms.sinks.at<const Real>(0, work.head));
      rescale_out(softmax, queries.size());
    }
    store_results(softmax, query_rows);
  }

 private:
  void rescale_out(const OnlineSoftmax<Real, kTileM>& softmax, int queries) {
    for (int query = 0; query < queries; ++query) {
      Real* row = out_.tile().row(query);
      const Vec<Real> rescale = broadcast(softmax.rescale(query));
      for (int column = 0; column < padded<Real>(params_.shape.head_dim_v);
           column += kLanes<Real>) {
        store(row + column, load(row + column) * rescale);
      }
    }
  }

  void raise_max_logit(const OnlineSoftmax<Real, kTileM>& softmax, const Rows& rows) const {
    Real largest = -kInfinity<Real>;
    for (int query = 0; query < rows.range.size(); ++query) {
      largest = max(largest, softmax.maximum(query));
    }
    Real& shared = params_.rules.terms.max_logit.at<Real>(0, rows.head);
    Real before;
    __atomic_load(&shared, &before, __ATOMIC_RELAXED);
    while (before < largest && !__atomic_compare_exchange(&shared, &before, &largest, false,
                                                          __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }

  void store_results(const OnlineSoftmax<Real, kTileM>& softmax, const Rows& rows) {
    const auto inverse_sum = [&softmax](int query) { return softmax.inverse_sum(query); };
    store_rows<Element>(out_.tile(), rows, params_.shape.head_dim_v, inverse_sum, params_.out);
    Real* lse = params_.softmax_lse.row<Real>(rows.batch, rows.head) + rows.first();
    for (int query = 0; query < rows.range.size(); ++query) {
      lse[query] = softmax.lse(query);
    }
  }

  const FwdParams& params_;
  TileBuffer<Real> rows_;  // q as it is loaded, then k: (queries or keys, head_dim)
  TileBuffer<Real> q_transposed_;
  TileBuffer<Real> v_;
  TileBuffer<Real> scores_;
  TileBuffer<Real> out_;
  TileRules<Real, kTileM, kTileN> rules_;
  TileTerms<Real, kTileM, kTileN> terms_;
};

template <int kRow>
void flash_fwd(const FwdParams& params, const LaunchContext& context) {
  constexpr KernelConfig kConfig = table::kRows[kRow];
  const Shape& shape = params.shape;
  const int tiles = ceil_div(shape.seqlen_q, kConfig.tile_m);
  const TileScheduler scheduler = {tiles, shape.num_heads, shape.batch};
  parallel_for(context, scheduler.count(), [&](int64_t begin, int64_t end) {
    FwdWorker<kConfig.dtype, kConfig.tile_m, kConfig.tile_n> worker(params);
    for (int64_t index = begin; index < end; ++index) {
      const WorkTile work = scheduler.at(index);
      worker.run({balanced(work.tile, tiles), work.head, work.batch});
    }
  });
}

}  // namespace fa::cpu::FA_CPU_ISA
