// SPDX-License-Identifier: BSD-3-Clause
// Forward on Hopper: out = softmax(scale * q k^T + mask) v and its log-sum-exp. As many blocks as
// multiprocessors take tiles of queries of one head until none is left. In a block,
//   warpgroup 0 loads: one of its warps takes the work, says in a ring of its own what it is, and
//   has TMA copy tiles of q, k and v through three more rings;
//   the others compute: each owns 64 rows of queries. Scores and out are its wgmma accumulators,
//   and p goes from accumulators to an A operand without leaving the lane.
//
// Tiles of keys go from the last to the first, so that the diagonal of a causal mask comes first.
// The math warpgroups take turns at the tensor cores, so that the softmax of one runs under the
// products of the others. In its turn a warpgroup issues two products:
//   out += p(j + 1) v(j + 1), s(j) = q k(j)^T; then it waits for both and turns s(j) into p(j).
#pragma once

#include <cfloat>

#include "common/params.h"
#include "device/convert.cuh"
#include "device/epilogue.cuh"
#include "device/mask.cuh"
#include "device/speculative_softmax.cuh"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"
#include "sm90/fwd_work.cuh"
#include "sm90/tensor_map.h"
#include "sm90/traits.h"

namespace fa::sm90 {

// What TMA must know of the tensors.
struct FwdTensorMaps {
  CUtensorMap q;
  CUtensorMap k;
  CUtensorMap v;
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

// The loading warp.
template <typename Traits>
FA_DEVICE void load_tiles(const FwdParams& params, const FwdTensorMaps& maps,
                          const Schedule& schedule, typename Traits::SharedMemory& s) {
  device::RingPosition<kStages> work_at;
  device::RingPosition<Traits::kQStages> q_at;
  device::RingPosition<kStages> k_at;
  device::RingPosition<kStages> v_at;
  const auto publish = [&](const FwdWork& work) {
    work_at.wait_empty(s.work_ring);
    if (ptx::lane_index() == 0) {
      s.work[work_at.stage()] = work;
      work_at.fill(s.work_ring);
    }
    __syncwarp();
    work_at.advance();
  };
  const auto take = [&] {
    const int64_t item = ptx::lane_index() == 0 ? take_item(schedule) : 0;
    return __shfl_sync(~0u, item, 0);
  };
  for (int64_t item = blockIdx.x; item < schedule.tiles.count(); item = take()) {
    const FwdWork work =
        FwdWork::of_item<Traits::kTileM, Traits::kTileN>(params, schedule, item);
    if (!work.exists()) {
      continue;
    }
    publish(work);
    if (work.key_tiles.empty()) {
      continue;
    }
    const int head_kv = work.tile.head / params.shape.group_size();
    const int batch_q = params.queries.cu_seqlens == nullptr ? work.tile.batch : 0;
    const int batch_k = params.keys.cu_seqlens == nullptr ? work.tile.batch : 0;
    load_tile(s.q, s.q_ring, q_at, maps.q, work.queries.begin + work.first_query, work.tile.head,
              batch_q);
    for (int j = work.key_tiles.end - 1; j >= work.key_tiles.begin - 1; --j) {
      const int row = work.keys.begin + j * Traits::kTileN;
      if (j >= work.key_tiles.begin) {
        load_tile(s.k, s.k_ring, k_at, maps.k, row, head_kv, batch_k);
      }
      if (j + 1 < work.key_tiles.end) {
        load_tile(s.v, s.v_ring, v_at, maps.v, row + Traits::kTileN, head_kv, batch_k);
      }
    }
  }
  FwdWork end = {.tile = {-1, 0, 0}, .window = params.window};
  publish(end);
  if (ptx::lane_index() == 0) {
    finish_taking(schedule);
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
  FA_DEVICE void pass() const {
    begin();
    end();
  }

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

// A warp's rows of out to global memory. Two rounds of exchange give each lane of a quad, which
// holds pairs of columns of every block, all of one block in four: 16 bytes.
template <typename Element, typename Out>
FA_DEVICE void store_rows(const Out& r_out, const device::GlobalTile<Element>& destination) {
  const int lane = ptx::lane_index() % 4;
#pragma unroll
  for (int block = 0; block < Out::kColBlocks; block += 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = ptx::convert_pair<Element>(r_out.r[0][block + i][2 * half],
                                              r_out.r[0][block + i][2 * half + 1]);
      }
      device::transpose_in_quad(pairs, lane);
      const int row = Out::row(half);
      const int col = Out::first_col(block + lane);
      if (row < destination.rows && col < destination.cols) {
        *reinterpret_cast<uint4*>(destination.at(row, col)) = {pairs[0], pairs[1], pairs[2],
                                                               pairs[3]};
      }
    }
  }
}

// A math warpgroup.
template <typename Traits>
FA_DEVICE void attend(const FwdParams& params, typename Traits::SharedMemory& s, int warpgroup) {
  using Element = typename Traits::Element;
  using Out = typename Traits::Out;
  constexpr int kTileN = Traits::kTileN;

  const int thread = static_cast<int>(threadIdx.x) % device::kWarpgroupThreads;
  const int warpgroup_barrier = 1 + warpgroup;
  const int warpgroup_row = warpgroup * device::kWarpgroupRows;
  const int warp_row = warpgroup_row + ptx::uniform(thread / ptx::kWarpSize) * device::kBlockRows;

  // exp2 wants a positive scale: a negative one is moved into q, and a tiny one stands for zero,
  // which would turn a masked -inf into NaN.
  const float softmax_scale = static_cast<float>(params.softmax_scale);
  const float positive_scale = fmaxf(fabsf(softmax_scale), FLT_MIN);
  // Rows of v past the end of a sequence are then those of another, which 0 must not multiply.
  const bool others_follow = params.keys.cu_seqlens != nullptr || params.keys.seqused != nullptr;

  const Turns<Traits> turns(warpgroup);
  device::RingPosition<kStages> work_at;
  device::RingPosition<Traits::kQStages> q_at;
  device::RingPosition<kStages> k_at;
  device::RingPosition<kStages> v_at;
  const auto skip_key_tile = [&] {
    k_at.wait(s.k_ring);
    k_at.release(s.k_ring);
    k_at.advance();
  };
  const auto skip_value_tile = [&] {
    v_at.wait(s.v_ring);
    v_at.release(s.v_ring);
    v_at.advance();
  };

  for (;;) {
    work_at.wait(s.work_ring);
    const FwdWork& s_work = s.work[work_at.stage()];
    if (s_work.is_end()) {
      break;
    }
    const WindowMask window = s_work.window;
    const int first_query = ptx::uniform(s_work.first_query);
    const int first_tile = ptx::uniform(s_work.key_tiles.begin);
    const int tiles_end = ptx::uniform(s_work.key_tiles.end);

    // Of those tiles, the ones that this warpgroup sees, and of these the ones that need no mask.
    const int warpgroup_query = first_query + warpgroup_row;
    const int warp_query = first_query + warp_row;
    const Range rows = {warpgroup_query, warpgroup_query + device::kWarpgroupRows};
    const Range seen = FwdWork::tiles_seen_by_any<kTileN>(window, rows);
    const Range unmasked = FwdWork::tiles_seen_by_all<kTileN>(window, rows);
    const int seen_begin = ptx::uniform(seen.begin);
    const int seen_end = ptx::uniform(seen.end);

    Out r_out;  // not yet normalized
    typename Out::RowValues lse;
    typename Out::RowValues normalizer;
    r_out.clear();
    device::SpeculativeSoftmax<Out::kRowsPerThread> softmax(positive_scale);
    if (first_tile < tiles_end) {
      q_at.wait(s.q_ring);
    }
    if (seen_begin < seen_end) {
      const auto& s_q = s.q[q_at.stage()];
      if (softmax_scale < 0.0f) {
        negate_rows(s.q[q_at.stage()], warpgroup_row, thread, warpgroup_barrier);
      }
      for (int j = tiles_end; j > seen_end; --j) {
        skip_key_tile();
      }

      // The scores of the last tile.
      int j = seen_end - 1;
      typename Traits::Probabilities r_p;
      {
        typename Traits::Scores r_scores;
        k_at.wait(s.k_ring);
        ptx::wgmma_fence();
        device::issue_abt<Traits::kHeadDim>(r_scores, s_q, warpgroup_row, s.k[k_at.stage()]);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(r_scores.r[0]);
        k_at.release(s.k_ring);
        k_at.advance();
        if (j < unmasked.begin || j >= unmasked.end) {
          device::keep_visible(r_scores, window, warp_query, j * kTileN, -INFINITY);
        }
        softmax.begin(r_scores, r_p);
      }
      for (int skipped = tiles_end; skipped > seen_end; --skipped) {
        skip_value_tile();
        turns.pass();
      }
      const int rows_of_last = window.seqlen_k() - j * kTileN;
      if (rows_of_last < kTileN && others_follow) {
        v_at.wait(s.v_ring);
        clear_rows(s.v[v_at.stage()], rows_of_last, thread, warpgroup_barrier);
      }

      const auto step = [&](auto masked) {
        typename Traits::Scores r_scores;
        v_at.wait(s.v_ring);
        k_at.wait(s.k_ring);
        turns.begin();
        ptx::wgmma_fence();
        device::issue_ab(r_out, r_p, s.v[v_at.stage()], true);
        device::issue_abt<Traits::kHeadDim>(r_scores, s_q, warpgroup_row, s.k[k_at.stage()]);
        ptx::wgmma_commit();
        turns.end();
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(r_out.r[0]);
        ptx::wgmma_pin(r_scores.r[0]);
        v_at.release(s.v_ring);
        v_at.advance();
        k_at.release(s.k_ring);
        k_at.advance();
        if constexpr (decltype(masked)::value) {
          device::keep_visible(r_scores, window, warp_query, j * kTileN, -INFINITY);
        }
        softmax.next(r_scores, r_p, [&](const auto& rescale) { r_out.scale_rows(rescale); });
      };
      for (--j; j >= seen_begin && j >= unmasked.end; --j) {
        step(std::true_type{});
      }
      for (; j >= seen_begin && j >= unmasked.begin; --j) {
        step(std::false_type{});
      }
      for (; j >= seen_begin; --j) {
        step(std::true_type{});
      }

      v_at.wait(s.v_ring);
      ptx::wgmma_fence();
      device::issue_ab(r_out, r_p, s.v[v_at.stage()], true);
      ptx::wgmma_commit();
      q_at.release(s.q_ring);
      q_at.advance();
      softmax.finalize(lse, normalizer);
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(r_out.r[0]);
      v_at.release(s.v_ring);
      v_at.advance();
      for (; j >= first_tile; --j) {
        skip_key_tile();
        skip_value_tile();
        turns.pass();
      }
    } else {
      for (int j = tiles_end; j > first_tile; --j) {
        skip_key_tile();
        skip_value_tile();
        if (j < tiles_end) {
          turns.pass();
        }
      }
      if (first_tile < tiles_end) {
        q_at.release(s.q_ring);
        q_at.advance();
      }
      softmax.finalize(lse, normalizer);
    }

    r_out.scale_rows(normalizer);
    const auto [tile, head, batch] = s_work.tile;
    device::store_row_values<Out>(
        lse, params.softmax_lse.row<float>(batch, head) + s_work.queries.begin, warp_query,
        s_work.queries.length);
    store_rows<Element>(r_out, device::global_tile<Element>(params.out, s_work.queries, batch,
                                                            warp_query, head,
                                                            params.shape.head_dim));
    __syncwarp();
    work_at.release(s.work_ring);
    work_at.advance();
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    flash_fwd_sm90(const __grid_constant__ FwdParams params,
                   const __grid_constant__ FwdTensorMaps maps, const Schedule schedule) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  auto& s = device::shared_memory<typename Traits::SharedMemory>();
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v}) {
      ptx::prefetch_tensor_map(map);
    }
    s.work_ring.init(Traits::kMathWarps);
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
    attend<Traits>(params, s, warpgroup - 1);
  }
#endif
}

}  // namespace fa::sm90
