// SPDX-License-Identifier: BSD-3-Clause
// Gradient of the bias: dS, summed over all that an element of the bias was broadcast to. A task
// owns a tile of it, sums in one order whatever the threads, and writes it once.
#pragma once

#include <cstdint>

#include "common/scheduler.h"
#include "cpu/bwd_tiles.h"
#include "cpu/parallel.h"

namespace fa::cpu::FA_CPU_ISA {

template <Dtype kDtype, int kTileM, int kTileN>
class BiasGradient {
  using Tiles = BwdTiles<kDtype, kTileM, kTileN>;
  using Real = typename Tiles::Real;

 public:
  BiasGradient(const BwdParams& params, const LaunchContext& context)
      : params_(params),
        context_(context),
        shape_(params.shape),
        dbias_(params.dbias),
        query_tiles_(ceil_div(shape_.seqlen_q, kTileM)),
        key_tiles_(ceil_div(shape_.seqlen_k, kTileN)) {}

  void run() const {
    const int rows = dbias_.query_stride == 0 ? 1 : query_tiles_;
    const int columns = dbias_.key_stride == 0 ? 1 : key_tiles_;
    const TileScheduler scheduler = {rows * columns, dbias_.head_stride == 0 ? 1 : shape_.num_heads,
                                     dbias_.batch_stride == 0 ? 1 : shape_.batch};
    parallel_for(context_, scheduler.count(), [&](int64_t begin, int64_t end) {
      Tiles tiles(params_);
      const TileBuffer<Real> sums(kTileN, kTileM);  // (keys, queries)
      for (int64_t index = begin; index < end; ++index) {
        const WorkTile work = scheduler.at(index);
        const Place place = {work.batch, work.head, work.tile / columns, work.tile % columns};
        fill_rows<Real>(sums.tile(), kTileN, kTileM, 0);
        sum_ds(place, tiles, sums.tile());
        const Range queries = sum_broadcast_queries(place, sums.tile());
        const Range keys = sum_broadcast_keys(place, sums.tile());
        with_dtype(params_.rules.bias_dtype, [&]<Dtype kBiasDtype>() {
          store_sums<kBiasDtype>(place, queries, keys, sums.tile());
        });
      }
    });
  }

 private:
  // Of a tile of the gradient; 0 in a dimension that was broadcast.
  struct Place {
    int batch;
    int head;
    int query_tile;
    int key_tile;
  };

  // All that share an element, where one stands for `count`.
  static Range sharing(int64_t stride, int index, int count) {
    return stride == 0 ? Range{0, count} : Range{index, index + 1};
  }

  void sum_ds(const Place& place, Tiles& tiles, Tile<Real> sums) const {
    const Range batches = sharing(dbias_.batch_stride, place.batch, shape_.batch);
    const Range heads = sharing(dbias_.head_stride, place.head, shape_.num_heads);
    const Range query_tiles = sharing(dbias_.query_stride, place.query_tile, query_tiles_);
    for (int batch = batches.begin; batch < batches.end; ++batch) {
      const SequencePair sequences(params_, batch);
      for (int head = heads.begin; head < heads.end; ++head) {
        for (int tile = query_tiles.begin; tile < query_tiles.end; ++tile) {
          const Range queries = tile_range(tile, kTileM, sequences.queries.length);
          if (!queries.empty()) {
            sum_ds(place, sequences, {batch, head, sequences.queries, queries}, tiles, sums);
          }
        }
      }
    }
  }

  // Of one tile of queries.
  void sum_ds(const Place& place, const SequencePair& sequences, const Rows& rows, Tiles& tiles,
              Tile<Real> sums) const {
    const int head_kv = rows.head / shape_.group_size();
    const Range key_tiles = sharing(dbias_.key_stride, place.key_tile, key_tiles_);
    bool loaded = false;
    tiles.set_queries(sequences.window, rows);
    for (int tile = key_tiles.begin; tile < key_tiles.end; ++tile) {
      const Range keys = tile_range(tile, kTileN, sequences.keys.length);
      tiles.set_keys({rows.batch, head_kv, sequences.keys, keys});
      if (keys.empty() || !tiles.any_seen()) {
        continue;
      }
      if (!loaded) {
        tiles.load_queries();
        loaded = true;
      }
      tiles.load_keys();
      tiles.compute_p_and_ds();
      tiles.add_ds(sums);
    }
  }

  // The rows of the gradient that the sums are for, after those of a broadcast one became one.
  Range sum_broadcast_queries(const Place& place, Tile<Real> sums) const {
    if (dbias_.query_stride != 0) {
      return tile_range(place.query_tile, kTileM, shape_.seqlen_q);
    }
    for (int key = 0; key < kTileN; ++key) {
      Vec<Real> sum = {};
      for (int query = 0; query < kTileM; query += kLanes<Real>) {
        sum += load(sums.row(key) + query);
      }
      sums.row(key)[0] = sum_of_lanes<Real>(sum);
    }
    return {0, 1};
  }

  Range sum_broadcast_keys(const Place& place, Tile<Real> sums) const {
    if (dbias_.key_stride != 0) {
      return tile_range(place.key_tile, kTileN, shape_.seqlen_k);
    }
    for (int key = 1; key < kTileN; ++key) {
      for (int query = 0; query < kTileM; query += kLanes<Real>) {
        Real* sum = sums.row(0) + query;
        store(sum, load(sum) + load(sums.row(key) + query));
      }
    }
    return {0, 1};
  }

  template <Dtype kBiasDtype>
  void store_sums(const Place& place, Range queries, Range keys, Tile<Real> sums) const {
    using Element = typename ElementOf<kBiasDtype>::Element;
    Element* elements = dbias_.of_head<Element>(place.batch, place.head);
    Real line[kTileN];
    for (int query = 0; query < queries.size(); ++query) {
      for (int key = 0; key < kTileN; ++key) {
        line[key] = sums.row(key)[query];
      }
      scatter<kBiasDtype>(line, keys.size(),
                          elements + dbias_.offset(queries.begin + query, keys.begin),
                          dbias_.key_stride);
    }
  }

  const BwdParams& params_;
  const LaunchContext& context_;
  const Shape& shape_;
  const ScoreTensor& dbias_;
  const int query_tiles_;  // of the longest sequence
  const int key_tiles_;
};

}  // namespace fa::cpu::FA_CPU_ISA
