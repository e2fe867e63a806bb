// SPDX-License-Identifier: BSD-3-Clause
// KeyTiles names all tiles that queries see and no mask is missing, for every warpgroup of every
// Hopper row and many geometries. What the warpgroups of a block see differs by as little as the
// rings of that kernel need. head_group makes groups of equal size with work for all blocks, and
// head_group_in_order as large ones as the L2 cache holds. turn_of_key_tile counts the tiles of
// keys that add to a tile of dq before each, with a prefix those that are seen alone.
#include "common/key_tiles.h"

#include <cstdint>
#include <limits>

#include "common/scheduler.h"
#include "common/tile_map.h"
#include "dispatch/kernel_table.h"
#include "tests/support/check.h"

namespace {

using fa::FwdParams;
using fa::KeyTiles;
using fa::PrefixWindow;
using fa::Range;
using fa::WindowMask;

constexpr int kWarpgroupRows = 64;

struct Tiling {
  int tile_m;
  int tile_n;
  bool holds_values;  // for out
};

// Pairs that are visible are in a tile that is seen, and before the last column of the last one. Of
// an unmasked tile all pairs are visible.
void check_tiles(const WindowMask& window, Range queries, int tile_n) {
  const KeyTiles tiles = KeyTiles::of(window, queries, tile_n);
  for (int query = queries.begin; query < queries.end && query < window.seqlen_q(); ++query) {
    for (int key = 0; key < window.seqlen_k() + tile_n; ++key) {
      const int tile = key / tile_n;
      const bool is_seen = tiles.seen.begin <= tile && tile < tiles.seen.end;
      if (window.allows(query, key)) {
        FA_EXPECT(is_seen, "query", query, "key", key);
        FA_EXPECT(tile < tiles.seen.end - 1 || key % tile_n < tiles.last_cols, "query", query,
                  "key", key);
      } else if (is_seen && tiles.unmasked.begin <= tile && tile < tiles.unmasked.end) {
        FA_EXPECT(false, "unmasked tile", tile, "query", query, "key", key);
      }
    }
  }
  if (!tiles.seen.empty()) {
    FA_EXPECT(0 < tiles.last_cols && tiles.last_cols <= tile_n, "last_cols", tiles.last_cols);
  }
}

// A warpgroup skips the tiles of its block that it does not see. While it skips the first it holds
// values back, and wide heads hold the last ones while they skip those behind: the loading warp
// must not come to wait for these.
void check_skips(const WindowMask& window, Range queries, const Tiling& tiling) {
  const Range block = KeyTiles::of(window, queries, tiling.tile_n).seen;
  for (int first = queries.begin; first < queries.end; first += kWarpgroupRows) {
    const Range rows = {first, fa::min(first + kWarpgroupRows, queries.end)};
    check_tiles(window, rows, tiling.tile_n);
    const Range own = KeyTiles::of(window, rows, tiling.tile_n).seen;
    if (own.empty()) {
      continue;
    }
    FA_EXPECT(block.begin <= own.begin && own.end <= block.end, "first", first);
    FA_EXPECT(own.begin - block.begin <= 3, "skipped", own.begin - block.begin);
    if (tiling.holds_values) {  // the first warpgroup the tile before the last, the second the last
      const bool is_first = first == queries.begin;
      const int held = is_first && block.size() > 1 ? block.end - 2 : block.end - 1;
      FA_EXPECT(own.begin <= held && held < own.end, "first", first, "held", held);
      FA_EXPECT(block.end - own.end <= (is_first ? 1 : 0), "skipped", block.end - own.end);
    }
  }
}

void check_groups(FwdParams params, int tiles, int blocks) {
  const int64_t heads = int64_t{params.shape.num_heads} * params.shape.batch;
  const int group =
      fa::head_group(params, {tiles, params.shape.num_heads, params.shape.batch}, blocks);
  FA_EXPECT(1 <= group && group <= heads, "group", group, "heads", heads);
  FA_EXPECT(int64_t{group} * tiles <= std::numeric_limits<int>::max(), "group", group);
  if (params.window.is_full()) {
    FA_EXPECT_EQ(group, 1, "heads", heads);
  } else if (group < heads) {
    FA_EXPECT(int64_t{2} * group * tiles >= blocks, "group", group, "tiles", tiles);
  }
}

void check_turns(const WindowMask& window, int tile_m, int tile_n) {
  for (int tile = 0; tile * tile_m < window.seqlen_q(); ++tile) {
    int adders = 0;
    for (int key_tile = (window.seqlen_k() - 1) / tile_n; key_tile >= 0; --key_tile) {
      const Range queries = window.queries_seeing_any({key_tile * tile_n, (key_tile + 1) * tile_n});
      if (!queries.empty() && queries.begin / tile_m <= tile &&
          tile < fa::ceil_div(queries.end, tile_m)) {
        FA_EXPECT_EQ(fa::turn_of_key_tile(window, tile, tile_m, key_tile, tile_n), adders, "tile",
                     tile);
        ++adders;
      }
    }
  }
}

// The same where all queries see some first keys, against the classes of all pairs of tiles.
void check_turns_with_prefix(const WindowMask& window, int prefix, int tile_m, int tile_n) {
  const PrefixWindow rules(window, prefix);
  for (int tile = 0; tile * tile_m < window.seqlen_q(); ++tile) {
    const Range queries = {tile * tile_m, (tile + 1) * tile_m};
    int adders = 0;
    for (int key_tile = (window.seqlen_k() - 1) / tile_n; key_tile >= 0; --key_tile) {
      FA_EXPECT_EQ(fa::turn_of_key_tile(rules, tile, tile_m, key_tile, tile_n), adders, "tile",
                   tile, "key tile", key_tile, "prefix", prefix);
      const Range keys = {key_tile * tile_n, (key_tile + 1) * tile_n};
      const Range seeing = rules.queries_seeing_any(keys);
      const bool is_seen = fa::class_of(rules, queries, keys) != fa::TileClass::kHidden;
      const bool is_walked = !seeing.empty() && seeing.begin / tile_m <= tile &&
                             tile < fa::ceil_div(seeing.end, tile_m);
      FA_EXPECT_EQ(is_walked, is_seen, "tile", tile, "key tile", key_tile, "prefix", prefix);
      adders += is_seen ? 1 : 0;
    }
  }
}

void check_group_in_order(const FwdParams& params, int heads) {
  const int64_t all_heads = int64_t{heads} * params.shape.batch;
  const int64_t group = fa::head_group_in_order(params, {1, heads, params.shape.batch});
  FA_EXPECT(1 <= group && group <= all_heads, "group", group, "heads", all_heads);
  const int64_t bytes =
      int64_t{8} * params.shape.seqlen_q * params.shape.head_dim * (params.shape.num_heads / heads);
  FA_EXPECT(group == 1 || group * bytes <= int64_t{32} << 20, "group", group);
  FA_EXPECT(group == all_heads || (group + 1) * bytes > int64_t{32} << 20, "group", group);
}

FwdParams params_of(int batch, int heads, int seqlen, bool causal) {
  return {.shape = {batch, heads, heads, seqlen, seqlen, 128},
          .window = WindowMask(seqlen, seqlen, -1, causal ? 0 : -1),
          .softmax_scale = 1.0,
          .q = {},
          .k = {},
          .v = {},
          .out = {},
          .softmax_lse = {}};
}

// What was found best: tiles for all blocks twice over, and of packed sequences and of documents
// once.
void check_measured_groups() {
  constexpr int kBlocks = 132;
  constexpr int kHeads = 16;
  const int32_t cu_seqlens[] = {0};
  const int32_t document_ids[] = {0};
  FA_EXPECT_EQ(fa::head_group(params_of(2, kHeads, 8192, true), {64, kHeads, 2}, kBlocks), 4);
  FwdParams packed = params_of(16, kHeads, 37300, true);
  packed.queries.cu_seqlens = packed.keys.cu_seqlens = cu_seqlens;
  const auto group_of_packed = [&](int tiles) {
    return fa::head_group(packed, {tiles, kHeads, 1}, kBlocks);
  };
  FA_EXPECT_EQ(group_of_packed(307), 8);      // 20 tiles of a sequence
  FA_EXPECT_EQ(group_of_packed(80), kHeads);  // 5, so that all heads are too few
  FA_EXPECT_EQ(group_of_packed(1168), 2);     // 73
  FwdParams documents = params_of(2, kHeads, 8192, true);
  documents.rules.document_ids = document_ids;
  FA_EXPECT_EQ(fa::head_group(documents, {64, kHeads, 2}, kBlocks), 16);
  documents.window = params_of(2, kHeads, 8192, false).window;
  FA_EXPECT_EQ(fa::head_group(documents, {64, kHeads, 2}, kBlocks), 16);
}

}  // namespace

int main() {
  for (const fa::KernelConfig& row : fa::table::kRows) {
    if (row.family != fa::Family::kSm90 || row.pass != fa::Pass::kForward ||
        row.dtype != fa::Dtype::kBFloat16) {
      continue;
    }
    const Tiling tiling = {row.tile_m, row.tile_n, row.q_stages() == 1};
    for (const int seqlen_q : {1, 64, 65, 127, 193, 300}) {
      for (const int seqlen_k : {1, 48, 80, 129, 256, 333}) {
        for (const int left : {-1, 0, 5, 100}) {
          for (const int right : {-1, 0, 7, 150}) {
            const WindowMask window(seqlen_q, seqlen_k, left, right);
            for (int tile = 0; tile * tiling.tile_m < seqlen_q; ++tile) {
              check_skips(window, fa::queries_of_tile(tile, seqlen_q, tiling.tile_m), tiling);
            }
            check_turns(window, 64, 128);
            check_turns(window, 128, 128);
            check_turns(window, 64, 64);
            for (const int prefix : {0, 1, 129, 300}) {
              check_turns_with_prefix(window, fa::min(prefix, seqlen_k), 64, 128);
              check_turns_with_prefix(window, fa::min(prefix, seqlen_k), 128, 128);
            }
          }
        }
      }
    }
  }
  check_measured_groups();
  for (const int blocks : {1, 2, 78, 114, 132, 148}) {
    for (const int heads : {1, 2, 8, 17, 64}) {
      for (const int batch : {1, 3, 32, 70000}) {
        for (const int tiles : {1, 2, 7, 86, 1 << 22}) {
          check_groups(params_of(batch, heads, tiles * 128 - 5, false), tiles, blocks);
          check_groups(params_of(batch, heads, tiles * 128 - 5, true), tiles, blocks);
          check_group_in_order(params_of(batch, heads, tiles * 128 - 5, true), heads);
          check_group_in_order(params_of(batch, heads, tiles * 128 - 5, true), 1);
        }
      }
    }
  }
  return fa::test::report("common/test_key_tiles");
}
