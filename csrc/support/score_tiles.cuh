// SPDX-License-Identifier: BSD-3-Clause
// Scores once more, for kernels beside the main ones. A block owns a tile of keys of one head and
// walks the tiles of queries that see some of them; products go through shared memory in chunks of
// columns, so that one kernel for each dtype serves every head_dim.
#pragma once

#include "common/params.h"
#include "common/scheduler.h"
#include "device/score_rules.cuh"
#include "device/smem.cuh"
#include "device/warp_grid.cuh"
#include "device/warp_mma.cuh"

namespace fa::support {

template <typename ElementOfTensors>
class ScoreTiles {
 public:
  using Element = ElementOfTensors;
  static constexpr int kTileM = 64;
  static constexpr int kTileN = 128;  // as many as any row of the table has, or more
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * ptx::kWarpSize;
  static constexpr int kBlocks = sizeof(Element) == 2 ? 2 : 1;  // of a multiprocessor

  using Grid = device::WarpGrid<kTileM, kTileN, kWarps>;
  using Sum = typename Grid::Sum;
  using Seen = device::SeenColumns<Sum>;

  static constexpr int kChunk = 128 / sizeof(Element);  // columns: a line of shared memory
  struct Chunk {
    device::SmemTile<Element, kTileM, kChunk> a;
    device::SmemTile<Element, kTileN, kChunk> b;
  };
  struct SharedMemory {
    Chunk chunks[2];
    float of_warps[kWarps];
  };

  // a b^T, of as many columns.
  struct Operands {
    device::GlobalTile<Element> a;  // (kTileM, cols)
    device::GlobalTile<Element> b;  // (kTileN, cols)
  };

  explicit FA_DEVICE ScoreTiles(SharedMemory& s) : s_(s) {}

  // Calls visit(rules, first_query, seen) for each tile of queries that has a pair to be seen with
  // the keys of a tile; rules are those of its head, and `seen` a thread's pairs by Grid.
  template <typename Params, typename Visit>
  static FA_DEVICE void each_seen(const Params& params, const WorkTile& keys, Visit&& visit) {
    const Shape& shape = params.shape;
    const WindowMask window =
        params.window.over(params.queries.at(keys.batch, shape.seqlen_q).length,
                           params.keys.at(keys.batch, shape.seqlen_k).length);
    const PrefixWindow visible(params.rules, window, keys.batch);
    const device::HeadRules rules(params.rules, visible, keys.batch, keys.head);
    const int first_key = keys.tile * kTileN;
    const Range queries = visible.queries_seeing_any({first_key, first_key + kTileN});
    for (int first_query = queries.begin / kTileM * kTileM; first_query < queries.end;
         first_query += kTileM) {
      Seen seen;
      rules.template find_seen<Sum>(seen, first_query + Grid::row(), first_key + Grid::col());
      uint32_t any = 0;
#pragma unroll
      for (const uint32_t bits : seen) {
        any |= bits;
      }
      if (__syncthreads_or(static_cast<int>(any))) {
        visit(rules, first_query, seen);
      }
    }
  }

  // A warp's share, by Grid, of a product that begin() began; then the next one may begin.
  // operands(): looked up for each chunk, rather than kept in registers.
  template <typename OperandsOf, typename BeginNext>
  FA_DEVICE void multiply(Sum& r_product, OperandsOf&& operands, BeginNext&& begin_next) {
    r_product.clear();
    const int cols = operands().a.cols;
#pragma unroll 1
    for (int col = 0; col < cols; col += kChunk) {
      const Chunk& s_chunk = s_.chunks[stage_];
      ptx::cp_async_wait_all();
      __syncthreads();  // the chunk has arrived, and every warp is done with the one before
      stage_ ^= 1;
      if (col + kChunk < cols) {
        load(operands(), col + kChunk);
      } else {
        begin_next();
      }
      device::accumulate_abt(r_product, s_chunk.a, Grid::row(), s_chunk.b, Grid::col());
    }
  }
  FA_DEVICE void begin(const Operands& operands) { load(operands, 0); }

  // Of all threads' values, for thread 0, in an order that is always the same.
  template <typename Operation>
  FA_DEVICE float reduce(float value, Operation&& operation) {
#pragma unroll
    for (int distance = ptx::kWarpSize / 2; distance > 0; distance /= 2) {
      value = operation(value, __shfl_xor_sync(~0u, value, distance));
    }
    if (ptx::lane_index() == 0) {
      s_.of_warps[ptx::warp_index()] = value;
    }
    __syncthreads();
    for (int warp = 1; warp < kWarps && threadIdx.x == 0; ++warp) {
      value = operation(value, s_.of_warps[warp]);
    }
    return value;
  }

 private:
  FA_DEVICE void load(const Operands& operands, int col) {
    const auto columns = [&](const device::GlobalTile<Element>& tile) {
      return device::GlobalTile<Element>{tile.g_first + col, tile.row_stride, tile.rows,
                                         tile.cols - col};
    };
    s_.chunks[stage_].a.template load_async<kThreads>(columns(operands.a));
    s_.chunks[stage_].b.template load_async<kThreads>(columns(operands.b));
  }

  SharedMemory& s_;
  int stage_ = 0;  // of the next chunk
};

}  // namespace fa::support
