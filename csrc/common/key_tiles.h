// SPDX-License-Identifier: BSD-3-Clause
// The tiles of keys that some consecutive queries meet, and how many heads are taken together.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "common/params.h"
#include "common/scheduler.h"
#include "common/score_rules.h"
#include "common/window.h"

namespace fa {

struct KeyTiles {
  Range seen;      // at least one key is seen by at least one of the queries
  Range unmasked;  // of these, every key is seen by every one of the queries; may be inverted
  int last_cols;   // keys of the last tile seen, up to the last one that any of the queries sees

  FA_HOST_DEVICE static constexpr KeyTiles of(const WindowMask& window, Range queries, int tile_n) {
    const Range any = window.keys_seen_by_any(queries);
    if (any.empty()) {
      return {{0, 0}, {0, 0}, 0};
    }
    const Range all = window.keys_seen_by_all(queries);
    const int end = ceil_div(any.end, tile_n);
    return {{any.begin / tile_n, end},
            {ceil_div(all.begin, tile_n), all.end / tile_n},
            any.end - (end - 1) * tile_n};
  }
};

// Rows of a sequence, of packed ones on average.
FA_HOST_DEVICE constexpr int usual_length(const Sequences& sequences, int batch, int seqlen) {
  return sequences.cu_seqlens == nullptr ? seqlen
                                         : min(seqlen, sequences.packed_rows / max(batch, 1));
}

// Heads whose tiles are taken together, the longest first: equal groups with work for all `blocks`
// twice over, so that there is little to wait for at the end. For short sequences once over: they
// wait for memory, and have the tensors of fewer heads in L2. Of packed sequences and documents the
// last ones are what is waited for: of them the tiles of a group should be for all blocks at once.
// Where all tiles are equally long, a head at a time. tiles: more than 0. Params: of a pass.
template <typename Params>
FA_HOST_DEVICE constexpr int head_group(const Params& params, const TileScheduler& tiles,
                                        int blocks) {
  constexpr int kShort = 1024;
  constexpr int kUsualDocuments = 8;  // of a sequence: only the device knows
  const Shape& shape = params.shape;
  const bool packed = params.queries.cu_seqlens != nullptr;
  const bool documents = params.rules.document_ids != nullptr;
  const bool equal_lengths =
      !packed && params.queries.seqused == nullptr && params.keys.seqused == nullptr;
  if (params.window.is_full() && equal_lengths && !documents) {
    return 1;
  }
  const int parts = packed ? shape.batch : documents ? kUsualDocuments : 1;
  const bool once = parts > 1 || shape.seqlen_k < kShort;
  const int64_t all_heads = int64_t{tiles.heads} * tiles.batch;
  const int64_t items_of_group = int64_t{blocks} * (once ? 1 : 2);
  const int64_t items = all_heads * ceil_div(tiles.tiles, max(parts, 1));
  const int64_t groups = (items + items_of_group / 2) / items_of_group;
  return static_cast<int>(ceil_div(all_heads, max(groups, int64_t{1})));
}

// Where tiles of keys add to what the tiles of queries that see them share, from the last one of a
// head to the first: how many add to a tile of queries before this one does. So under a causal mask
// each is the first at the tile that it begins with.
FA_HOST_DEVICE constexpr int turn_of_key_tile(const WindowMask& window, int query_tile, int tile_m,
                                              int key_tile, int tile_n) {
  const Range queries = {query_tile * tile_m, (query_tile + 1) * tile_m};
  return (window.keys_seen_by_any(queries).end - 1) / tile_n - key_tile;
}

// The same where a prefix is seen too, and tiles of keys in which none of the queries sees any add
// nothing: those behind this one in which some query sees a key.
FA_HOST_DEVICE constexpr int turn_of_key_tile(const PrefixWindow& window, int query_tile,
                                              int tile_m, int key_tile, int tile_n) {
  const Range queries = {query_tile * tile_m, (query_tile + 1) * tile_m};
  const Range keys = window.window().keys_seen_by_any(queries);
  const Range tiles = {keys.begin / tile_n,
                       keys.empty() ? keys.begin / tile_n : ceil_div(keys.end, tile_n)};
  const int end_of_prefix =
      queries.begin < window.window().seqlen_q() ? ceil_div(window.prefix(), tile_n) : 0;
  const int next = key_tile + 1;
  return max(tiles.end - max(tiles.begin, next), 0) +  // and of the prefix those on either side
         max(min(end_of_prefix, tiles.begin) - next, 0) +
         max(end_of_prefix - max(tiles.end, next), 0);
}

// head_group where items begin in order: tiles of one head wait for each other, so the more heads
// the better, as long as the L2 cache holds what their tiles share. Params: of a backward pass.
template <typename Params>
FA_HOST_DEVICE constexpr int head_group_in_order(const Params& params, const TileScheduler& tiles) {
  constexpr int64_t kBytes = int64_t{32} << 20;
  constexpr int kBytesPerElement = 2 + 2 + 4;  // of q, dout and the sums of dq
  const Shape& shape = params.shape;
  const int seqlen_q = usual_length(params.queries, shape.batch, shape.seqlen_q);
  const int64_t bytes_of_head = int64_t{max(seqlen_q, 1)} * shape.head_dim * kBytesPerElement *
                                (shape.num_heads / max(tiles.heads, 1));
  return static_cast<int>(
      min(max(kBytes / bytes_of_head, int64_t{1}), int64_t{tiles.heads} * tiles.batch));
}

}  // namespace fa
