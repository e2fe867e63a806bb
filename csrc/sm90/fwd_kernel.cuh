// SPDX-License-Identifier: BSD-3-Clause
// Forward on Hopper: out = softmax(scale * q k^T + mask) v and its log-sum-exp. As many blocks as
// multiprocessors take tiles of queries of one head in turn. In a block,
//   warpgroup 0 loads: one of its warps has TMA copy tiles of q, k and v through three rings,
//   the others compute: each owns 64 rows of queries. Scores and out are its wgmma accumulators,
//   and p goes from accumulators to an A operand without leaving the lane.
//
// Tiles of keys go from the last to the first, so that the diagonal of a causal mask comes first.
// While the scores of a tile become p, the product of the previous tile's p and v runs; and the
// math warpgroups take turns in issuing, so that one's softmax runs under the other's products:
//   issue s(j) = q k(j)^T, issue out += p(j + 1) v(j + 1), wait for s(j), p(j), wait for out
// m is raised rarely (device/softmax.cuh), and out is rescaled only then.
//
// out leaves through the shared memory of its own queries, a warp at a time.
#pragma once

#include <cfloat>

#include "common/params.h"
#include "common/scheduler.h"
#include "device/convert.cuh"
#include "device/epilogue.cuh"
#include "device/mask.cuh"
#include "device/softmax.cuh"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"
#include "sm90/tensor_map.h"
#include "sm90/traits.h"

namespace fa::sm90 {

// What TMA must know of the tensors; out in boxes of a warp's 16 rows.
struct FwdTensorMaps {
  CUtensorMap q;
  CUtensorMap k;
  CUtensorMap v;
  CUtensorMap out;
};

FA_DEVICE int64_t opaque(int64_t x) {
  return static_cast<int64_t>(ptx::opaque(static_cast<uint32_t>(x >> 32))) << 32 |
         ptx::opaque(static_cast<uint32_t>(x));
}

// How blocks share the work.
struct Schedule {
  TileScheduler tiles;
  int head_group;
};

FA_DEVICE Sequence uniform(const Sequence& sequence) {
  return {ptx::uniform(sequence.begin), ptx::uniform(sequence.length)};
}

// A tile of queries and the tiles of keys that it sees; the same in all lanes of a warp.
template <typename Traits>
struct FwdWork {
  FA_DEVICE FwdWork(const FwdParams& params, const Schedule& schedule, int64_t index)
      : tile(schedule.tiles.last_first_of_group(index, schedule.head_group)),
        sequence_q(uniform(params.queries.at(tile.batch, params.shape.seqlen_q))),
        sequence_k(uniform(params.keys.at(tile.batch, params.shape.seqlen_k))),
        window(params.window.over(sequence_q.length, sequence_k.length)),
        first_query(tile.tile * Traits::kTileM) {
    const Range keys = window.keys_seen_by_any({first_query, first_query + Traits::kTileM});
    key_tiles = keys.empty()
                    ? Range{0, 0}
                    : Range{keys.begin / Traits::kTileN, ceil_div(keys.end, Traits::kTileN)};
  }

  FA_DEVICE bool exists() const { return first_query < sequence_q.length; }

  WorkTile tile;
  Sequence sequence_q;
  Sequence sequence_k;
  WindowMask window;
  int first_query;
  Range key_tiles;
};

// By one warp: fills the next stage of a ring.
template <typename Tile, int kRingStages>
FA_DEVICE void load_tile(Tile (&s_tiles)[kRingStages], device::Ring<kRingStages>& s_ring,
                         device::RingPosition<kRingStages>& at, const CUtensorMap& map, int row,
                         int head, int batch) {
  at.wait_empty(s_ring);
  if (ptx::lane_index() == 0) {
    uint64_t& s_full = at.expect(s_ring, sizeof(Tile));
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      ptx::tma_load(s_tiles[at.stage()].elements + panel * Tile::kRows * Tile::kPanelCols, &map,
                    {panel * Tile::kPanelCols, row, head, batch}, s_full);
    }
  }
  __syncwarp();
  at.advance();
}

template <typename Traits>
FA_DEVICE void load_tiles(const FwdParams& params, const FwdTensorMaps& maps,
                          const Schedule& schedule, typename Traits::SharedMemory& s) {
  device::RingPosition<Traits::kQStages> q_at;
  device::RingPosition<kStages> k_at;
  device::RingPosition<kStages> v_at;
  for (int64_t index = blockIdx.x; index < schedule.tiles.count(); index += gridDim.x) {
    const FwdWork<Traits> work(params, schedule, index);
    if (!work.exists() || work.key_tiles.empty()) {
      continue;
    }
    const int head_kv = work.tile.head / params.shape.group_size();
    const int batch_q = params.queries.cu_seqlens == nullptr ? work.tile.batch : 0;
    const int batch_k = params.keys.cu_seqlens == nullptr ? work.tile.batch : 0;
    load_tile(s.q, s.q_ring, q_at, maps.q, work.sequence_q.begin + work.first_query, work.tile.head,
              batch_q);
    for (int j = work.key_tiles.end - 1; j >= work.key_tiles.begin - 1; --j) {
      const int row = work.sequence_k.begin + j * Traits::kTileN;
      if (j >= work.key_tiles.begin) {
        load_tile(s.k, s.k_ring, k_at, maps.k, row, head_kv, batch_k);
      }
      if (j + 1 < work.key_tiles.end) {
        load_tile(s.v, s.v_ring, v_at, maps.v, row + Traits::kTileN, head_kv, batch_k);
      }
    }
  }
}

// The turns in which math warpgroups issue products: named barriers, one for each, at which it
// waits for the one before it.
template <typename Traits>
class Turns {
 public:
  FA_DEVICE explicit Turns(int warpgroup) : own_(kFirst + warpgroup) {
    next_ = warpgroup + 1 == Traits::kMathWarpgroups ? kFirst : own_ + 1;
    if (warpgroup + 1 == Traits::kMathWarpgroups) {
      end();
    }
  }
  FA_DEVICE void begin() const { ptx::barrier_sync<kThreads>(own_); }
  FA_DEVICE void end() const { ptx::barrier_arrive<kThreads>(next_); }

 private:
  static constexpr int kFirst = 1 + Traits::kMathWarpgroups;  // after those of single warpgroups
  static constexpr int kThreads = 2 * device::kWarpgroupThreads;
  int own_;
  int next_;
};

// Rows [first, rows) of a tile become zero, by one warpgroup, for wgmma to read.
template <typename Tile>
FA_DEVICE void clear_rows(Tile& s_tile, int first, int thread, int barrier) {
  const int units = (Tile::kRows - first) * Tile::kUnitsPerLine;
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    uint4* s_panel = reinterpret_cast<uint4*>(s_tile.elements +
                                              (panel * Tile::kRows + first) * Tile::kPanelCols);
    for (int unit = thread; unit < units; unit += device::kWarpgroupThreads) {
      s_panel[unit] = {0, 0, 0, 0};
    }
  }
  ptx::fence_async_proxy();
  ptx::barrier_sync<device::kWarpgroupThreads>(barrier);
}

// Flips the signs of 64 rows of a tile, by one warpgroup, for wgmma to read.
template <typename Tile>
FA_DEVICE void negate_rows(Tile& s_tile, int first, int thread, int barrier) {
  constexpr uint32_t kSigns = 0x80008000u;
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    uint4* s_panel = reinterpret_cast<uint4*>(s_tile.elements +
                                              (panel * Tile::kRows + first) * Tile::kPanelCols);
    for (int unit = thread; unit < device::kWarpgroupRows * Tile::kUnitsPerLine;
         unit += device::kWarpgroupThreads) {
      const uint4 bits = s_panel[unit];
      s_panel[unit] = {bits.x ^ kSigns, bits.y ^ kSigns, bits.z ^ kSigns, bits.w ^ kSigns};
    }
  }
  ptx::fence_async_proxy();
  ptx::barrier_sync<device::kWarpgroupThreads>(barrier);
}

// A warp's 16 rows of a shared tile, from `row` on, to out; all of them by TMA, and fewer, where
// the sequence ends among them, by its lanes. Rows of zeros without a tile.
template <typename Tile, typename Element>
FA_DEVICE void store_rows(const Tile* s_tile, int row, const CUtensorMap& map,
                          const ptx::BoxOrigin& origin,
                          const device::GlobalTile<Element>& destination) {
  ptx::fence_async_proxy();
  __syncwarp();
  if (s_tile != nullptr && destination.rows >= device::kBlockRows) {
    if (ptx::lane_index() == 0) {
#pragma unroll
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        ptx::tma_store(&map, {panel * Tile::kPanelCols, origin.row, origin.head, origin.batch},
                       s_tile->elements + (panel * Tile::kRows + row) * Tile::kPanelCols);
      }
      ptx::tma_commit();
    }
    return;
  }
  constexpr int kUnits = Tile::kCols / Tile::kUnitElements;
  const int lane = static_cast<int>(ptx::opaque(ptx::lane_index()));
#pragma unroll 1
  for (int unit = lane; unit < device::kBlockRows * kUnits; unit += ptx::kWarpSize) {
    const int unit_row = unit / kUnits;
    const int col = unit % kUnits * Tile::kUnitElements;
    if (unit_row < destination.rows && col < destination.cols) {
      *reinterpret_cast<uint4*>(destination.at(unit_row, col)) =
          s_tile == nullptr ? uint4{0, 0, 0, 0}
                            : *reinterpret_cast<const uint4*>(s_tile->elements +
                                                              Tile::offset(row + unit_row, col));
    }
  }
}

template <typename Traits>
FA_DEVICE void attend(const FwdParams& params, const FwdTensorMaps& maps, const Schedule& schedule,
                      typename Traits::SharedMemory& s, int warpgroup) {
  using Element = typename Traits::Element;
  using Scores = typename Traits::Scores;
  using Out = typename Traits::Out;
  using QueryTile = typename Traits::template Rows<Traits::kTileM>;
  constexpr int kTileN = Traits::kTileN;

  const int thread = static_cast<int>(threadIdx.x) % device::kWarpgroupThreads;
  const int warpgroup_barrier = 1 + warpgroup;
  const int warpgroup_row = warpgroup * device::kWarpgroupRows;
  const int warp_row = warpgroup_row + ptx::uniform(thread / ptx::kWarpSize) * device::kBlockRows;

  // exp2 wants a positive scale: a negative one is moved into q, and a tiny one stands for zero,
  // which would turn a masked -inf into NaN.
  const float softmax_scale = static_cast<float>(params.softmax_scale);
  const float positive_scale = fmaxf(fabsf(softmax_scale), FLT_MIN);

  const Turns<Traits> turns(warpgroup);
  device::RingPosition<Traits::kQStages> q_at;
  device::RingPosition<kStages> k_at;
  device::RingPosition<kStages> v_at;

  for (int64_t index = blockIdx.x; index < schedule.tiles.count(); index += gridDim.x) {
    const FwdWork<Traits> work(params, schedule, index);
    if (!work.exists()) {
      continue;
    }
    const int warpgroup_query = work.first_query + warpgroup_row;
    const int warp_query = work.first_query + warp_row;
    // Where results go is looked up again where it is used, rather than kept in registers through
    // the loop.
    const auto store_lse = [&](const typename Out::RowValues& lse) {
      const FwdWork<Traits> again(params, schedule, opaque(index));
      device::store_row_values<Out>(
          lse,
          params.softmax_lse.row<float>(again.tile.batch, again.tile.head) + again.sequence_q.begin,
          again.first_query + warp_row, again.sequence_q.length);
    };
    const auto store_out = [&](const auto* s_tile) {
      const FwdWork<Traits> again(params, schedule, opaque(index));
      const auto [tile, head, batch] = again.tile;
      const int warp_query = again.first_query + warp_row;
      store_rows(s_tile, warp_row, maps.out,
                 {0, again.sequence_q.begin + warp_query, head,
                  params.queries.cu_seqlens == nullptr ? batch : 0},
                 device::global_tile<Element>(params.out, again.sequence_q, batch, warp_query, head,
                                              params.shape.head_dim));
    };

    device::OnlineSoftmax<Out::kRowsPerThread> softmax(positive_scale);
    typename Out::RowValues sums;
    typename Out::RowValues lse;
    typename Out::RowValues normalizer;
    if (work.key_tiles.empty()) {
      softmax.sums(sums);
      softmax.finalize(sums, lse, normalizer);
      store_lse(lse);
      store_out(static_cast<const QueryTile*>(nullptr));
      continue;
    }

    // Tiles that need no mask for this warpgroup: [unmasked.begin, unmasked.end).
    const Range seen_by_all =
        work.window.keys_seen_by_all({warpgroup_query, warpgroup_query + device::kWarpgroupRows});
    const Range unmasked = {ceil_div(seen_by_all.begin, kTileN), seen_by_all.end / kTileN};
    const auto is_masked = [&](int j) { return j < unmasked.begin || j >= unmasked.end; };
    const auto& s_q = s.q[q_at.stage()];

    // The scores of the last tile.
    int j = work.key_tiles.end - 1;
    q_at.wait(s.q_ring);
    if (softmax_scale < 0.0f) {
      negate_rows(s.q[q_at.stage()], warpgroup_row, thread, warpgroup_barrier);
    }
    typename Traits::Probabilities r_p;
    {
      Scores r_scores;
      k_at.wait(s.k_ring);
      ptx::wgmma_fence();
      device::issue_abt<Traits::kHeadDim>(r_scores, s_q, warpgroup_row, s.k[k_at.stage()]);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(r_scores.r[0]);
      k_at.release(s.k_ring);
      k_at.advance();
      if (is_masked(j)) {
        device::keep_visible(r_scores, work.window, warp_query, j * kTileN, -INFINITY);
      }
      typename Out::RowValues largest;
      typename Out::RowValues rescale;
      softmax.largest(r_scores, largest);
      softmax.raise(largest, rescale);
      softmax.exponentiate(r_scores);
      r_p = device::to_operand<Element>(r_scores);
    }
    // p of a key past the end is 0, and 0 times what lies there in memory may be NaN.
    const int rows_of_last = work.sequence_k.length - j * kTileN;
    const bool others_follow = params.keys.cu_seqlens != nullptr || params.keys.seqused != nullptr;
    if (rows_of_last < kTileN && others_follow) {
      v_at.wait(s.v_ring);
      clear_rows(s.v[v_at.stage()], rows_of_last, thread, warpgroup_barrier);
    }

    Out r_out;  // not yet normalized
    r_out.clear();
    // Also the end of a basic block, over which ptxas does not move the wait for out that follows:
    // it would wait before the exponentials, which are to run under the product.
    const auto wait_for_keys = [&](int tile) {
      if (tile >= work.key_tiles.begin) {
        k_at.wait(s.k_ring);
      }
    };
    const auto step = [&](auto masked) {
      Scores r_scores;
      turns.begin();
      ptx::wgmma_fence();
      device::issue_abt<Traits::kHeadDim>(r_scores, s_q, warpgroup_row, s.k[k_at.stage()]);
      ptx::wgmma_commit();
      v_at.wait(s.v_ring);
      ptx::wgmma_fence();
      device::issue_ab(r_out, r_p, s.v[v_at.stage()], true);
      ptx::wgmma_commit();
      turns.end();
      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(r_scores.r[0]);
      k_at.release(s.k_ring);
      k_at.advance();
      if constexpr (decltype(masked)::value) {
        device::keep_visible(r_scores, work.window, warp_query, j * kTileN, -INFINITY);
      }
      typename Out::RowValues largest;
      typename Out::RowValues rescale;
      softmax.largest(r_scores, largest);
      const bool raised = softmax.raise(largest, rescale);
      softmax.exponentiate(r_scores);
      wait_for_keys(j - 1);
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(r_out.r[0]);
      v_at.release(s.v_ring);
      v_at.advance();
      if (__any_sync(~0u, raised)) {
        r_out.scale_rows(rescale);
      }
      r_p = device::to_operand<Element>(r_scores);
    };
    wait_for_keys(--j);
    for (; j >= work.key_tiles.begin && j >= unmasked.end; --j) {
      step(std::true_type{});
    }
    for (; j >= work.key_tiles.begin && j >= unmasked.begin; --j) {
      step(std::false_type{});
    }
    for (; j >= work.key_tiles.begin; --j) {
      step(std::true_type{});
    }

    v_at.wait(s.v_ring);
    ptx::wgmma_fence();
    device::issue_ab(r_out, r_p, s.v[v_at.stage()], true);
    ptx::wgmma_commit();
    softmax.sums(sums);
    softmax.finalize(sums, lse, normalizer);
    store_lse(lse);
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(r_out.r[0]);
    v_at.release(s.v_ring);
    v_at.advance();

    r_out.scale_rows(normalizer);
    ptx::barrier_sync<device::kWarpgroupThreads>(warpgroup_barrier);  // all have read their q
    device::store_elements(r_out, s.q[q_at.stage()], warp_row, 0);
    store_out(&s.q[q_at.stage()]);
    if (ptx::lane_index() == 0) {
      ptx::tma_wait_read();
    }
    __syncwarp();
    q_at.release(s.q_ring);
    q_at.advance();
  }
  if (ptx::lane_index() == 0) {
    ptx::tma_wait();
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    flash_fwd_sm90(const __grid_constant__ FwdParams params,
                   const __grid_constant__ FwdTensorMaps maps, const Schedule schedule) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  auto& s = device::shared_memory<typename Traits::SharedMemory>();
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.out}) {
      ptx::prefetch_tensor_map(map);
    }
    s.q_ring.init(Traits::kMathWarps);
    s.k_ring.init(Traits::kMathWarps);
    s.v_ring.init(Traits::kMathWarps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / device::kWarpgroupThreads);
  if (warpgroup == 0) {
    ptx::shrink_registers<Traits::kProducerRegisters>();
    if (ptx::warp_index() == 0) {
      load_tiles<Traits>(params, maps, schedule, s);
    }
  } else {
    ptx::grow_registers<Traits::kMathRegisters>();
    attend<Traits>(params, maps, schedule, s, warpgroup - 1);
  }
#endif
}

}  // namespace fa::sm90
