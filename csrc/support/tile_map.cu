// SPDX-License-Identifier: BSD-3-Clause
// A warp tells the class of a pair of tiles, one of queries and one of keys: first by what can be
// told without reading the masks, then by their bytes, of which it reads those that differ, or
// bits. Where one byte of each mask stands for all pairs, a thread does.
#include "support/tile_map.h"

#include <cstdint>

#include "device/work_order.cuh"
#include "support/launch.cuh"

namespace fa::support {
namespace {

constexpr int kWarps = 8;  // of a block, for neighbouring tiles of keys
constexpr int kThreads = kWarps * ptx::kWarpSize;
constexpr int kBlocks = 4;  // of a multiprocessor: for more, ptxas has registers for too few bytes

// What two rules that must both allow a pair say together.
FA_DEVICE constexpr TileClass both(TileClass a, TileClass b) { return a < b ? a : b; }

// What the bytes of a mask say of a pair of tiles, as far as they have been read: bits that are not
// zero where some hide, and where some do not.
struct Bytes {
  uint32_t hiding = 0;
  uint32_t showing = 0;

  FA_DEVICE void add(uint8_t byte) {
    hiding |= byte == 0;
    showing |= byte;
  }
  FA_DEVICE void add(const uint4& bytes) {
    showing |= bytes.x | bytes.y | bytes.z | bytes.w;
    hiding |= __vcmpeq4(bytes.x, 0) | __vcmpeq4(bytes.y, 0) | __vcmpeq4(bytes.z, 0) |
              __vcmpeq4(bytes.w, 0);
  }
  // Of the whole warp.
  FA_DEVICE TileClass tile_class() const {
    const bool any_hides = __any_sync(~0u, hiding != 0);
    const bool any_shows = __any_sync(~0u, showing != 0);
    return any_hides && any_shows ? TileClass::kMixed
           : any_hides            ? TileClass::kHidden
                                  : TileClass::kSeen;
  }
};

// Bytes at g_first + row * row_stride + col * col_stride.
struct Rectangle {
  const uint8_t* g_first;
  int rows;
  int cols;
  int64_t row_stride;
  int64_t col_stride;
};

// Reads `count` units of a rectangle by all lanes, several at a time, until both kinds have been
// seen. load(unit) has what Bytes takes.
template <typename Load>
FA_DEVICE void read_units(Bytes& bytes, int count, Load&& load) {
  constexpr int kAtOnce = 8;
  for (int first = ptx::lane_index(); first - ptx::lane_index() < count;
       first += kAtOnce * ptx::kWarpSize) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      bytes.add(load(min(first + i * ptx::kWarpSize, count - 1)));  // the last one again: no matter
    }
    if (bytes.tile_class() == TileClass::kMixed) {
      return;
    }
  }
}

// 16 bytes at a time where they lie side by side and are aligned.
FA_DEVICE TileClass class_of(Rectangle bytes) {
  if (bytes.row_stride == 1) {
    bytes = {bytes.g_first, bytes.cols, bytes.rows, bytes.col_stride, bytes.row_stride};
  }
  constexpr int kWide = sizeof(uint4);
  const auto address = reinterpret_cast<uintptr_t>(bytes.g_first);
  const bool is_wide = bytes.col_stride == 1 && address % kWide == 0 &&
                       (bytes.rows == 1 || bytes.row_stride % kWide == 0);
  const int wide_cols = is_wide ? bytes.cols / kWide : 0;
  Bytes read;
  if (wide_cols > 0) {
    read_units(read, bytes.rows * wide_cols, [&](int unit) {
      const int row = unit / wide_cols;
      const uint8_t* g_row = bytes.g_first + row * bytes.row_stride;
      return __ldg(reinterpret_cast<const uint4*>(g_row) + (unit - row * wide_cols));
    });
  }
  const int narrow_cols = bytes.cols - wide_cols * kWide;
  if (narrow_cols > 0) {
    read_units(read, bytes.rows * narrow_cols, [&](int unit) {
      const int row = unit / narrow_cols;
      const int col = wide_cols * kWide + unit - row * narrow_cols;
      return __ldg(bytes.g_first + row * bytes.row_stride + col * bytes.col_stride);
    });
  }
  return read.tile_class();
}

// The entries of a mask that stand for the queries or the keys of a range: all one where the mask
// is broadcast.
FA_DEVICE Range entries_of(Range range, int block_log2, int64_t stride) {
  return stride == 0 ? Range{0, 1}
                     : Range{range.begin >> block_log2, ((range.end - 1) >> block_log2) + 1};
}

FA_DEVICE TileClass class_by_mask(const KeepMask& mask, int batch, int head, Range queries,
                                  Range keys) {
  const Range rows = entries_of(queries, mask.block_log2, mask.query_stride);
  const Range cols = entries_of(keys, mask.block_log2, mask.key_stride);
  return class_of(
      Rectangle{mask.of_head<const uint8_t>(batch, head) + mask.offset(rows.begin, cols.begin),
                rows.size(), cols.size(), mask.query_stride, mask.key_stride});
}

// The smallest and the largest id of some rows, by all lanes.
FA_DEVICE Range ids_of(const int32_t* g_ids, Range rows) {
  int smallest = INT32_MAX;
  int largest = INT32_MIN;
  for (int row = rows.begin + ptx::lane_index(); row < rows.end; row += ptx::kWarpSize) {
    const int id = __ldg(g_ids + row);
    smallest = min(smallest, id);
    largest = max(largest, id);
  }
  return {__reduce_min_sync(~0u, smallest), __reduce_max_sync(~0u, largest)};
}

FA_DEVICE TileClass class_by_documents(const int32_t* g_ids, Range queries, Range keys) {
  const Range of_queries = ids_of(g_ids, queries);
  const Range of_keys = ids_of(g_ids, keys);
  if (of_queries.end < of_keys.begin || of_keys.end < of_queries.begin) {
    return TileClass::kHidden;
  }
  const bool is_one = of_queries.begin == of_queries.end && of_keys.begin == of_keys.end;
  return is_one ? TileClass::kSeen : TileClass::kMixed;
}

// By the bits of the first mask, of a tile in which so many pairs exist.
FA_DEVICE TileClass class_by_bits(const uint32_t* g_words, int words, int pairs) {
  const auto* g_units = reinterpret_cast<const uint4*>(g_words);
  int seen = 0;
#pragma unroll 2
  for (int unit = ptx::lane_index(); unit < words / 4; unit += ptx::kWarpSize) {
    const uint4 bits = __ldg(g_units + unit);
    seen += __popc(bits.x) + __popc(bits.y) + __popc(bits.z) + __popc(bits.w);
  }
  seen = __reduce_add_sync(~0u, seen);
  return seen == 0 ? TileClass::kHidden : seen == pairs ? TileClass::kSeen : TileClass::kMixed;
}

// Of queries and keys that exist. g_words: what stands for the first mask, or null.
FA_DEVICE TileClass class_by_data(const TileMapParams& params, int batch, int head, Range queries,
                                  Range keys, const uint32_t* g_words) {
  const ScoreRules& rules = params.rules;
  TileClass result = TileClass::kSeen;
  if (rules.document_ids != nullptr) {
    result = class_by_documents(rules.document_ids + batch * rules.document_stride, queries, keys);
  }
  for (const KeepMask& mask : rules.masks) {
    if (mask.data == nullptr || result == TileClass::kHidden) {
      break;
    }
    result = both(result, &mask == rules.masks && g_words != nullptr
                              ? class_by_bits(g_words, params.pair_bits.tile_words,
                                              queries.size() * keys.size())
                              : class_by_mask(mask, batch, head, queries, keys));
  }
  return result;
}

// Writes the class of a tile of queries, which the scheduler's batch numbers, and a tile of keys,
// the one at `place` among the block's kTiles. by_data(batch, head, queries, keys, g_words): what
// masks and documents say of those that exist; g_words: what stands for the first mask, or null.
template <int kTiles, typename ByData>
FA_DEVICE void tell_class(const TileMapParams& params, const TileScheduler& scheduler, int place,
                          bool writes, ByData&& by_data) {
  const Shape& shape = params.shape;
  const WorkTile item = scheduler.at(scheduler.first + blockIdx.x);
  const auto tile =
      device::find_tile(params.queries, item.batch, shape.batch, shape.seqlen_q, params.tile_m);
  const int queries = params.queries.at(tile.batch, shape.seqlen_q).length;
  const int keys = params.keys.at(tile.batch, shape.seqlen_k).length;
  const int key_tile = item.tile * kTiles + place;
  const int first_query = tile.tile * params.tile_m;
  const int first_key = key_tile * params.tile_n;
  if (first_query >= queries || first_key >= keys) {
    return;
  }
  const Range query_range = {first_query, first_query + params.tile_m};
  const Range key_range = {first_key, first_key + params.tile_n};
  const PrefixWindow window(params.rules, params.window.over(queries, keys), tile.batch);
  TileClass result = fa::class_of(window, query_range, key_range);
  if (result != TileClass::kHidden) {
    // Where a sequence ends inside a tile and its tensor goes on, bits tell of what does not exist.
    const bool has_bits = params.pair_bits.words != nullptr &&
                          (query_range.end <= queries || queries == shape.seqlen_q) &&
                          (key_range.end <= keys || keys == shape.seqlen_k);
    result = both(
        result, by_data(tile.batch, item.head, Range{first_query, min(query_range.end, queries)},
                        Range{first_key, min(key_range.end, keys)},
                        has_bits ? params.pair_bits.tile(tile.batch, item.head, tile.tile, key_tile)
                                 : nullptr));
  }
  if (writes) {
    params.map.row(item.head, item.batch)[key_tile] = result;
  }
}

// By a warp for each class.
__global__ void __launch_bounds__(kThreads, kBlocks)
    flash_tile_map(const __grid_constant__ TileMapParams params, const TileScheduler scheduler) {
  tell_class<kWarps>(params, scheduler, ptx::warp_index(), ptx::lane_index() == 0,
                     [&](int batch, int head, Range queries, Range keys, const uint32_t* g_words) {
                       return class_by_data(params, batch, head, queries, keys, g_words);
                     });
}

// By a thread, where one byte of each mask stands for all pairs of a tile.
__global__ void __launch_bounds__(kThreads)
    flash_block_map(const __grid_constant__ TileMapParams params, const TileScheduler scheduler) {
  tell_class<kThreads>(params, scheduler, static_cast<int>(threadIdx.x), true,
                       [&](int batch, int head, Range queries, Range keys, const uint32_t*) {
                         bool all_show = true;
                         for (const KeepMask& mask : params.rules.masks) {
                           if (mask.data != nullptr) {
                             const uint8_t* g_mask = mask.of_head<const uint8_t>(batch, head);
                             all_show &=
                                 __ldg(g_mask + mask.offset(queries.begin >> mask.block_log2,
                                                            keys.begin >> mask.block_log2)) != 0;
                           }
                         }
                         return all_show ? TileClass::kSeen : TileClass::kHidden;
                       });
}

// Whether every tile lies within one block of every mask.
bool is_of_blocks(const TileMapParams& params) {
  bool result = params.rules.document_ids == nullptr;
  for (const KeepMask& mask : params.rules.masks) {
    const int block = 1 << mask.block_log2;
    result &= mask.data == nullptr || (block % params.tile_m == 0 && block % params.tile_n == 0);
  }
  return result;
}

}  // namespace

void launch_tile_map(const TileMapParams& params, void* stream) {
  const Shape& shape = params.shape;
  const int64_t query_tiles = params.queries.count_tiles(shape.batch, params.queries.packed_rows,
                                                         shape.seqlen_q, params.tile_m);
  const int heads = params.map.head_stride == 0 ? 1 : shape.num_heads;
  const auto scheduler = [&](int tiles) {
    return TileScheduler{ceil_div(params.map.key_tiles, tiles), heads,
                         shape.batch == 0 ? 0 : static_cast<int>(query_tiles)};
  };
  if (is_of_blocks(params)) {
    launch<flash_block_map>("flash_block_map", params, scheduler(kThreads), kThreads, 0, stream);
  } else {
    launch<flash_tile_map>("flash_tile_map", params, scheduler(kWarps), kThreads, 0, stream);
  }
}

}  // namespace fa::support
