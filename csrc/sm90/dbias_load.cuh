// SPDX-License-Identifier: BSD-3-Clause
// The warp that loads what the gradient of a bias is computed from.
#pragma once

#include "common/dbias_tiles.h"
#include "device/seen_tiles.cuh"
#include "sm90/bwd_general_load.cuh"
#include "sm90/dbias_traits.h"
#include "sm90/schedule.cuh"

namespace fa::sm90 {

// By one warp.
template <typename Traits>
class DbiasLoader {
 public:
  FA_DEVICE DbiasLoader(const BwdParams& params, const GeneralBwdTensorMaps& maps,
                        typename Traits::SharedMemory& s)
      : params_(params), maps_(maps), s_(s), landing_{s.landing} {}

  // All tiles of scores in which some pair is seen and that add to a tile of the gradient: batch
  // entry after batch entry, tiles of keys, heads, and tiles of queries.
  FA_DEVICE void load(int batch_of_bias, int head_of_bias, int query_tile, int key_tile) {
    const Shape& shape = params_.shape;
    const ScoreTensor& dbias = params_.dbias;
    const Range batches = shared_range(batch_of_bias, shape.batch, dbias.batch_stride);
    const Range heads = shared_range(head_of_bias, shape.num_heads, dbias.head_stride);
    begins_ = true;
    for (int batch = batches.begin; batch < batches.end; ++batch) {
      const Sequence queries = params_.queries.at(batch, shape.seqlen_q);
      const Sequence keys = params_.keys.at(batch, shape.seqlen_k);
      const PrefixWindow window(params_.rules, params_.window.over(queries.length, keys.length),
                                batch);
      const int64_t first_tile = params_.queries.first_tile(batch, shape.seqlen_q, kTileM);
      const int all = ceil_div(queries.length, kTileM);
      const int first = query_tile * Traits::kTiles;
      const Range query_tiles = dbias.query_stride == 0
                                    ? Range{0, all}
                                    : Range{min(first, all), min(first + Traits::kTiles, all)};
      const Range key_tiles =
          shared_range(key_tile, ceil_div(keys.length, kTileN), dbias.key_stride);
      const bool is_last_batch = batch + 1 == batches.end;
      for (int tile = key_tiles.begin; tile < key_tiles.end; ++tile) {
        each_visible(heads, query_tiles, tile, window, first_tile,
                     [&](int head, int query_tile_of_scores, bool is_mixed) {
                       const bool is_last = is_last_batch && head + 1 == heads.end;
                       load_tile({.bits = (is_mixed ? ToldScores::kMixed : 0) |
                                          (is_last ? ToldScores::kFreesBias : 0),
                                  .batch = batch,
                                  .head = head,
                                  .query_tile = query_tile_of_scores,
                                  .key_tile = tile,
                                  .prefix = window.prefix(),
                                  .window = window.window()},
                                 queries, keys, first_tile);
                     });
      }
    }
  }

  // Tells that there is no more.
  FA_DEVICE void end() {
    at_.wait_empty(s_.q_ring);
    if (ptx::lane_index() == 0) {
      s_.told[at_.stage()].bits = ToldScores::kEnd;
      at_.fill(s_.q_ring);
    }
  }

 private:
  static constexpr int kTileM = Traits::kTileM;
  static constexpr int kTileN = Traits::kTileN;

  // Calls visit(head, query_tile, is_mixed). Each lane looks at one of the tiles.
  template <typename Visit>
  FA_DEVICE void each_visible(const Range& heads, const Range& query_tiles, int key_tile,
                              const PrefixWindow& window, int64_t first_tile, Visit&& visit) {
    const device::TileClasses<kTileM, kTileN> classes(params_.tile_map, window, first_tile);
    const int of_head = query_tiles.size();
    const int count = heads.size() * of_head;
    for (int first = 0; first < count; first += ptx::kWarpSize) {
      const int index = first + ptx::lane_index();
      const int head = heads.begin + index / of_head;
      const int query_tile = query_tiles.begin + index % of_head;
      const TileClass tile_class =
          index < count ? classes.at(head, query_tile, key_tile) : TileClass::kHidden;
      const bool ends_in_tile = (query_tile + 1) * kTileM > window.window().seqlen_q();
      const uint32_t mixed = __ballot_sync(~0u, tile_class != TileClass::kSeen || ends_in_tile);
      for (uint32_t visible = __ballot_sync(~0u, tile_class != TileClass::kHidden); visible != 0;
           visible &= visible - 1) {
        const int lane = __ffs(static_cast<int>(visible)) - 1;
        visit(__shfl_sync(~0u, head, lane), __shfl_sync(~0u, query_tile, lane),
              (mixed >> lane & 1) != 0);
      }
    }
  }

  // told: but for what the loads add to it.
  FA_DEVICE void load_tile(ToldScores told, const Sequence& queries, const Sequence& keys,
                           int64_t first_tile) {
    if (begins_) {
      begins_ = false;
      has_bias_ = 0;
      told.bits |= ToldScores::kBegins;
    }
    const int head_kv = told.head / params_.shape.group_size();
    const bool brings_keys =
        told.batch != keys_batch_ || told.key_tile != keys_tile_ || head_kv != keys_head_;
    if (brings_keys) {
      keys_batch_ = told.batch;
      keys_tile_ = told.key_tile;
      keys_head_ = head_kv;
      told.bits |= ToldScores::kBringsKeys;
      if (Traits::kKeyStages != 1) {
        load_keys(keys);
      }
    }
    const int place = told.query_tile % Traits::kTiles;
    const bool brings_bias = maps_.loads_bias && (has_bias_ >> place & 1) == 0;
    if (brings_bias) {
      has_bias_ |= 1 << place;
      bias_stages_ = (bias_stages_ & ~(1 << place)) | bias_at_.stage() << place;
      told.bits |= ToldScores::kBringsBias;
    }
    if ((bias_stages_ >> place & 1) != 0) {
      told.bits |= ToldScores::kSecondBiasStage;
    }

    at_.wait_empty(s_.q_ring);
    if (ptx::lane_index() == 0) {
      s_.told[at_.stage()] = told;
    }
    load_queries(told, queries, first_tile);
    at_.advance();
    if (brings_keys && Traits::kKeyStages == 1) {  // free when those who compute know of these
      load_keys(keys);
    }
    if (brings_bias) {
      load_bias(told);
    }
  }

  FA_DEVICE void load_keys(const Sequence& keys) {
    auto& s_keys = s_.keys[keys_at_.stage()];
    const int first_key = keys_tile_ * kTileN;
    const int keep = rows_to_keep(params_.keys, keys, first_key, kTileN);
    const int batch = params_.keys.cu_seqlens == nullptr ? keys_batch_ : 0;
    fill_stage(
        s_.keys_ring, keys_at_, sizeof(s_keys), keep < kTileN, landing_,
        [&](uint64_t& s_barrier) {
          copy_rows(s_keys.k, 0, s_barrier, maps_.k, keys.begin + first_key, keys_head_, batch);
          copy_rows(s_keys.v, 0, s_barrier, maps_.v, keys.begin + first_key, keys_head_, batch);
        },
        [&](int lane) {
          clear_rows<ptx::kWarpSize>(s_keys.k, keep, lane);
          clear_rows<ptx::kWarpSize>(s_keys.v, keep, lane);
        });
    keys_at_.advance();
  }

  FA_DEVICE void load_queries(const ToldScores& told, const Sequence& queries, int64_t first_tile) {
    const int first_query = told.query_tile * kTileM;
    const int keep = rows_to_keep(params_.queries, queries, first_query, kTileM);
    const int row = queries.begin + first_query;
    const int batch = params_.queries.cu_seqlens == nullptr ? told.batch : 0;
    auto& s_q = s_.q[at_.stage()];
    auto& s_dout = s_.dout[at_.stage()];
    auto& s_statistics = s_.statistics[at_.stage()];
    fill_stage(
        s_.q_ring, at_, sizeof(s_q), keep < kTileM, landing_,
        [&](uint64_t& s_barrier) { copy_rows(s_q, 0, s_barrier, maps_.q, row, told.head, batch); },
        [&](int lane) { clear_rows<ptx::kWarpSize>(s_q, keep, lane); });
    fill_stage(
        s_.dout_ring, at_, sizeof(s_dout) + sizeof(s_statistics), keep < kTileM, landing_,
        [&](uint64_t& s_barrier) {
          const int64_t index = params_.workspace.index(told.head, first_tile + told.query_tile);
          copy_rows(s_dout, 0, s_barrier, maps_.dout, row, told.head, batch);
          ptx::bulk_load(&s_statistics, params_.workspace.lse_log2(index), sizeof(s_statistics),
                         s_barrier);
        },
        [&](int lane) { clear_rows<ptx::kWarpSize>(s_dout, keep, lane); });
  }

  FA_DEVICE void load_bias(const ToldScores& told) {
    auto& s_bias = s_.bias[bias_at_.stage()];
    bias_at_.wait_empty(s_.bias_ring);
    if (ptx::lane_index() == 0) {
      copy_bias(s_bias, bias_at_.expect(s_.bias_ring, sizeof(s_bias)), maps_.bias,
                params_.rules.bias, told.batch, told.head, told.query_tile * kTileM,
                told.key_tile * kTileN);
    }
    __syncwarp();
    bias_at_.advance();
  }

  const BwdParams& params_;
  const GeneralBwdTensorMaps& maps_;
  typename Traits::SharedMemory& s_;
  Landing landing_;
  device::RingPosition<kBwdStages> at_;
  device::RingPosition<Traits::kKeyStages> keys_at_;
  device::RingPosition<Traits::kBiasStages> bias_at_;
  // Whose keys were loaded last.
  int keys_batch_ = -1;
  int keys_tile_ = -1;
  int keys_head_ = -1;
  // Of the tile of the gradient: whether nothing of it has been loaded; and a bit for each of
  // the row's tiles in it, whether its bias has been, and in which stage.
  bool begins_ = false;
  int has_bias_ = 0;
  int bias_stages_ = 0;
};

// Takes strips and loads what adds to their tiles, by one warp.
template <typename Traits>
FA_DEVICE void load_scores_of_bias(const BwdParams& params, const GeneralBwdTensorMaps& maps,
                                   const DbiasTiles& tiles, const Schedule& schedule,
                                   typename Traits::SharedMemory& s) {
  DbiasLoader<Traits> loader(params, maps, s);
  const auto take_next = [&] {
    const uint32_t item = ptx::lane_index() == 0 ? take_item(schedule) : 0;
    return __shfl_sync(~0u, item, 0);
  };
  for (uint32_t item = blockIdx.x; item < schedule.items; item = take_next()) {
    const WorkTile strip = schedule.tiles.at(item);
    const Range query_tiles = tiles.queries(strip.tile);
    for (int tile = query_tiles.begin; tile < query_tiles.end; ++tile) {
      loader.load(strip.batch, strip.head, tile, tiles.key_tile(strip.tile));
    }
  }
  loader.end();
  if (ptx::lane_index() == 0) {
    finish_taking(schedule);
  }
}

}  // namespace fa::sm90
