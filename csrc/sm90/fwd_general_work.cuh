// SPDX-License-Identifier: BSD-3-Clause
// What the blocks of the general forward kernel work on.
#pragma once

#include "common/params.h"
#include "device/work_order.cuh"
#include "sm90/schedule.cuh"
#include "sm90/visible_tiles.cuh"

namespace fa::sm90 {

// A tile of queries. Tiles begin with the sequence, as those of the tile map.
struct GeneralFwdWork {
  WorkTile tile;
  Sequence queries;  // up to the last one of the tile
  Sequence keys;
  WindowMask window;
  int first_query;
  Range key_tiles;             // that the window and the prefix let see
  const TileClass* g_classes;  // of the tile's queries; or null
  float* lse;                  // of the sequence's first query

  template <int kTileM, int kTileN>
  static FA_DEVICE GeneralFwdWork of_item(const FwdParams& params, const Schedule& schedule,
                                          uint32_t index) {
    const Shape& shape = params.shape;
    const WorkTile tile =
        device::in_sequence(schedule.tiles.last_first_of_group(index, schedule.head_group),
                            params.queries, shape.batch, shape.seqlen_q, kTileM);
    const Sequence all_queries = params.queries.at(tile.batch, shape.seqlen_q);
    const Sequence keys = params.keys.at(tile.batch, shape.seqlen_k);
    const WindowMask window = params.window.over(all_queries.length, keys.length);
    const int first_query = tile.tile * kTileM;
    const int end_query = min(first_query + kTileM, all_queries.length);
    const Range seen =
        PrefixWindow(params.rules, window, tile.batch).keys_seen_by_any({first_query, end_query});
    const int64_t map_row =
        params.queries.first_tile(tile.batch, shape.seqlen_q, kTileM) + tile.tile;
    return {tile,
            {all_queries.begin, end_query},
            keys,
            window,
            first_query,
            {seen.begin / kTileN, seen.empty() ? seen.begin / kTileN : ceil_div(seen.end, kTileN)},
            params.tile_map.classes == nullptr ? nullptr : params.tile_map.row(tile.head, map_row),
            params.softmax_lse.row<float>(tile.batch, tile.head) + all_queries.begin};
  }

  // By one warp: tells the others.
  FA_DEVICE void write(const FwdParams&, const GeneralFwdWork& work) {
    if (ptx::lane_index() == 0) {
      *this = work;
    }
  }

  // Reads this while the tiles are walked.
  template <int kTileN>
  FA_DEVICE auto visible_tiles(const FwdParams& params, Tiles which) const {
    return VisibleTiles(which, key_tiles, [this, &params](int key_tile) {
      const int first_key = key_tile * kTileN;
      return g_classes != nullptr ? g_classes[key_tile]
                                  : class_of(prefix_window(params), {first_query, queries.length},
                                             {first_key, first_key + kTileN});
    });
  }

  FA_DEVICE PrefixWindow prefix_window(const FwdParams& params) const {
    return {params.rules, window, tile.batch};
  }

  // Where TMA finds the sequences: packed ones are all in one batch entry.
  FA_DEVICE int batch_of_queries(const FwdParams& params) const {
    return params.queries.cu_seqlens == nullptr ? tile.batch : 0;
  }
  FA_DEVICE int batch_of_keys(const FwdParams& params) const {
    return params.keys.cu_seqlens == nullptr ? tile.batch : 0;
  }

  FA_DEVICE bool exists() const { return first_query < queries.length; }

  // Stands behind the last item.
  FA_DEVICE bool is_end() const { return tile.tile < 0; }
};

}  // namespace fa::sm90
