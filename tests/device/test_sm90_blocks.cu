// SPDX-License-Identifier: BSD-3-Clause
// The blocks of csrc/device and csrc/ptx under sm90, each against a loop on the host. Prints a line
// per check; returns 0 if all hold, 1 if one does not, 77 without a GPU of compute capability 9.0.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>
#include <string>
#include <type_traits>

#include "device/convert.cuh"
#include "device/pipeline.cuh"
#include "device/store_rows.cuh"
#include "device/warpgroup_mma.cuh"
#include "ptx/tma.cuh"
#include "sm90/tensor_map.h"
#include "tests/support/cuda_blocks.h"

namespace {

using namespace fa;
using namespace fa::test;
using device::SmemTile;

template <typename Element>
constexpr Dtype kDtypeOf = std::is_same_v<Element, __half> ? Dtype::kFloat16 : Dtype::kBFloat16;

// A contiguous (rows, cols) matrix as one head of a tensor.
template <typename Element>
CUtensorMap map_of(const Managed<Element>& matrix, int rows, int cols, int box_rows) {
  const TensorView view = {matrix.data, int64_t{rows} * cols, cols, cols};
  return sm90::make_tensor_map({view, kDtypeOf<Element>, 1, 1, rows, cols, box_rows});
}

// By one thread: all panels of a tile from (row, 0) on.
template <typename Tile>
__device__ void load(Tile& s_tile, const CUtensorMap& map, int row, uint64_t& s_barrier) {
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    ptx::tma_load(s_tile.elements + panel * Tile::kRows * Tile::kPanelCols, &map,
                  {panel * Tile::kPanelCols, row, 0, 0}, s_barrier);
  }
}

// --- TMA ---

template <typename Tile>
struct alignas(1024) TmaMemory {
  Tile tile;
  device::Ring<1> ring;
};

// Loads the tile at first_row and stores what it holds, as TMA laid it out, and then by TMA into
// `out`, from 16 rows on.
template <typename Element, typename Tile>
__global__ void tma_kernel(const __grid_constant__ CUtensorMap in,
                           const __grid_constant__ CUtensorMap out, int first_row,
                           Element* g_tile) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  auto& s = device::shared_memory<TmaMemory<Tile>>();
  if (threadIdx.x == 0) {
    s.ring.init(1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const device::RingPosition<1> at;
  if (threadIdx.x == 0) {
    at.wait_empty(s.ring);
    load(s.tile, in, first_row, at.expect(s.ring, sizeof(Tile)));
  }
  at.wait(s.ring);
  dump_tile(s.tile, g_tile);
  if (threadIdx.x == 0) {
    ptx::tma_store(&out, {0, 16, 0, 0}, s.tile.elements);
    ptx::tma_commit();
    ptx::tma_wait();
  }
#endif
}

// Loads the second head.
template <typename Element, typename Tile>
__global__ void shared_head_kernel(const __grid_constant__ CUtensorMap in, Element* g_tile) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  auto& s = device::shared_memory<TmaMemory<Tile>>();
  if (threadIdx.x == 0) {
    s.ring.init(1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const device::RingPosition<1> at;
  if (threadIdx.x == 0) {
    ptx::tma_load(s.tile.elements, &in, {0, 0, 1, 0}, at.expect(s.ring, sizeof(Tile)));
  }
  at.wait(s.ring);
  dump_tile(s.tile, g_tile);
#endif
}

template <typename Element, int kRows, int kCols>
void test_tma(int rows, int cols, int first_row) {
  using Tile = SmemTile<Element, kRows, kCols>;
  Managed<Element> in(int64_t{rows} * cols);
  Managed<Element> tile(kRows * kCols, Element(kUntouched));
  Managed<Element> out(int64_t{rows} * cols, Element(kUntouched));
  fill(in, 3);
  run<tma_kernel<Element, Tile>>(1, 128, sizeof(TmaMemory<Tile>), map_of(in, rows, cols, kRows),
                                 map_of(out, rows, cols, kRows), first_row, tile.data);
  const auto source = [&](int row, int col) {
    return row < rows && col < cols ? static_cast<float>(in[row * cols + col]) : 0.0f;
  };
  const std::string name = shape_name(kRows, kCols) + " of " + shape_name(rows, cols);
  expect(
      "tma_load " + name, kRows, kCols, 0,
      [&](int r, int c) { return static_cast<float>(tile[r * kCols + c]); },
      [&](int r, int c) { return source(first_row + r, c); });
  expect(
      "tma_store " + name, rows, cols, 0,
      [&](int r, int c) { return static_cast<float>(out[r * cols + c]); },
      [&](int r, int c) {
        const bool stored = 16 <= r && r < 16 + kRows && c < Tile::kPanelCols;
        return stored ? source(first_row + r - 16, c) : kUntouched;
      });
}

// Heads that share their memory, as torch's expand() makes them: (2 heads, of stride 0).
template <typename Element>
void test_shared_heads() {
  using Tile = SmemTile<Element, 16, 64>;
  Managed<Element> in(16 * 64);
  Managed<Element> tile(16 * 64, Element(kUntouched));
  fill(in, 6);
  const TensorView view = {in.data, 0, 64, 0};
  const CUtensorMap map = sm90::make_tensor_map({view, kDtypeOf<Element>, 1, 2, 16, 64, 16});
  run<shared_head_kernel<Element, Tile>>(1, 128, sizeof(TmaMemory<Tile>), map, tile.data);
  expect(
      "tma_load, stride 0", 16, 64, 0,
      [&](int r, int c) { return static_cast<float>(tile[r * 64 + c]); },
      [&](int r, int c) { return static_cast<float>(in[r * 64 + c]); });
}

// --- wgmma ---

template <typename A, typename B>
struct alignas(1024) ProductMemory {
  A a;
  B b;
};

template <typename Element, int kCols, int kTileCols, int kDepth, int kTileRows>
__global__ void abt_kernel(const Element* g_a, const Element* g_b, float* g_sum) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using A = SmemTile<Element, 2 * device::kWarpgroupRows, kTileCols>;
  using B = SmemTile<Element, kTileRows, kTileCols>;
  auto& s = device::shared_memory<ProductMemory<A, B>>();
  fill_tile(s.a, g_a);
  fill_tile(s.b, g_b);
  ptx::fence_async_proxy();
  __syncthreads();
  device::Accumulator<device::kBlockRows, kCols> r_sum;
  ptx::wgmma_fence();
  device::issue_abt<kDepth>(r_sum, s.a, device::kWarpgroupRows, s.b);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_pin(r_sum.r[0]);
  dump(r_sum, g_sum, kCols, ptx::warp_index() * device::kBlockRows, 0);
#endif
}

std::string depth_name(int depth, int tile_rows) {
  return " depth " + std::to_string(depth) + ", b of " + std::to_string(tile_rows) + " rows";
}

// The second 64 rows of a, the first kCols rows of b, the first kDepth columns of their tiles.
template <typename Element, int kCols, int kTileCols, int kDepth, int kTileRows = kCols>
void test_abt() {
  constexpr int kRows = device::kWarpgroupRows;
  using A = SmemTile<Element, 2 * kRows, kTileCols>;
  using B = SmemTile<Element, kTileRows, kTileCols>;
  Managed<Element> a(2 * kRows * kTileCols);
  Managed<Element> b(kTileRows * kTileCols);
  Managed<float> sum(kRows * kCols, kUntouched);
  fill(a, 1);
  fill(b, 2);
  run<abt_kernel<Element, kCols, kTileCols, kDepth, kTileRows>>(
      1, device::kWarpgroupThreads, sizeof(ProductMemory<A, B>), a.data, b.data, sum.data);
  expect(
      "issue_abt " + shape_name(kRows, kCols) + depth_name(kDepth, kTileRows), kRows, kCols, 0,
      [&](int r, int c) { return sum[r * kCols + c]; },
      [&](int r, int c) {
        float expected = 0.0f;
        for (int i = 0; i < kDepth; ++i) {
          expected += static_cast<float>(a[(kRows + r) * kTileCols + i]) *
                      static_cast<float>(b[c * kTileCols + i]);
        }
        return expected;
      });
}

template <typename Element, int kDepth, int kTileCols, int kCols, int kTileRows>
__global__ void ab_kernel(const float* g_a, const Element* g_b, float* g_sum) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using B = SmemTile<Element, kTileRows, kTileCols>;
  auto& s = device::shared_memory<ProductMemory<B, B>>();
  fill_tile(s.b, g_b);
  ptx::fence_async_proxy();
  __syncthreads();
  const int row = ptx::warp_index() * device::kBlockRows;
  device::Accumulator<device::kBlockRows, kDepth> r_a;
  r_a.transform([&](float, int i, int block, int j) {
    return g_a[(row + r_a.row(i)) * kDepth + r_a.col(block, j)];
  });
  const auto r_operand = device::to_operand<Element>(r_a);
  device::Accumulator<device::kBlockRows, kCols> r_sum;
  r_sum.clear();
  for (int time = 0; time < 2; ++time) {
    ptx::wgmma_fence();
    device::issue_ab(r_sum, r_operand, s.b, true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(r_sum.r[0]);
  }
  dump(r_sum, g_sum, kCols, row, 0);
#endif
}

// Twice a b, where a comes from accumulators and b may have more rows than a has columns, and more
// columns than the product.
template <typename Element, int kDepth, int kTileCols, int kCols, int kTileRows = kDepth>
void test_ab() {
  constexpr int kRows = device::kWarpgroupRows;
  using B = SmemTile<Element, kTileRows, kTileCols>;
  Managed<float> a(kRows * kDepth);
  Managed<Element> b(kTileRows * kTileCols);
  Managed<float> sum(kRows * kCols, kUntouched);
  fill(a, 4);
  fill(b, 5);
  run<ab_kernel<Element, kDepth, kTileCols, kCols, kTileRows>>(
      1, device::kWarpgroupThreads, sizeof(ProductMemory<B, B>), a.data, b.data, sum.data);
  expect(
      "issue_ab " + shape_name(kRows, kCols) + depth_name(kDepth, kTileRows), kRows, kCols, 0,
      [&](int r, int c) { return sum[r * kCols + c]; },
      [&](int r, int c) {
        float expected = 0.0f;
        for (int i = 0; i < kDepth; ++i) {
          expected += 2.0f * a[r * kDepth + i] * static_cast<float>(b[i * kTileCols + c]);
        }
        return expected;
      });
}

template <typename Element, int kRowsA, int kColsB, int kCol>
__global__ void ab_of_part_kernel(const Element* g_a, const Element* g_b, float* g_sum) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kDepth = 128;
  auto& s = device::shared_memory<
      ProductMemory<SmemTile<Element, kRowsA, kDepth>, SmemTile<Element, kDepth, kColsB>>>();
  fill_tile(s.a, g_a);
  fill_tile(s.b, g_b);
  ptx::fence_async_proxy();
  __syncthreads();
  device::Accumulator<device::kBlockRows, 64> r_sum;
  ptx::wgmma_fence();
  device::issue_ab<kDepth>(r_sum, s.a, kRowsA - device::kWarpgroupRows, s.b, kCol);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_pin(r_sum.r[0]);
  dump(r_sum, g_sum, 64, ptx::warp_index() * device::kBlockRows, 0);
#endif
}

// The last 64 rows of a by 64 columns of b from kCol on, both from shared memory.
template <typename Element, int kRowsA, int kColsB, int kCol>
void test_ab_of_part() {
  constexpr int kDepth = 128;
  constexpr int kRows = device::kWarpgroupRows;
  using Memory =
      ProductMemory<SmemTile<Element, kRowsA, kDepth>, SmemTile<Element, kDepth, kColsB>>;
  Managed<Element> a(kRowsA * kDepth);
  Managed<Element> b(kDepth * kColsB);
  Managed<float> sum(kRows * 64, kUntouched);
  fill(a, 6);
  fill(b, 7);
  run<ab_of_part_kernel<Element, kRowsA, kColsB, kCol>>(1, device::kWarpgroupThreads,
                                                        sizeof(Memory), a.data, b.data, sum.data);
  expect(
      "issue_ab, 64 rows of " + shape_name(kRowsA, kDepth) + " by 64 columns from " +
          std::to_string(kCol) + " on of " + shape_name(kDepth, kColsB),
      kRows, 64, 0, [&](int r, int c) { return sum[r * 64 + c]; },
      [&](int r, int c) {
        float expected = 0.0f;
        for (int i = 0; i < kDepth; ++i) {
          expected += static_cast<float>(a[(kRowsA - kRows + r) * kDepth + i]) *
                      static_cast<float>(b[i * kColsB + kCol + c]);
        }
        return expected;
      });
}

template <typename Element, int kCols, int kColsAtOnce>
__global__ void ab_in_parts_kernel(const Element* g_a, const Element* g_b, float* g_sum) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kDepth = 64;
  auto& s = device::shared_memory<ProductMemory<SmemTile<Element, device::kWarpgroupRows, kDepth>,
                                                SmemTile<Element, kDepth, kCols>>>();
  fill_tile(s.a, g_a);
  fill_tile(s.b, g_b);
  ptx::fence_async_proxy();
  __syncthreads();
  device::Accumulator<device::kBlockRows, kCols> r_sum;
  r_sum.clear();
#pragma unroll 1
  for (int time = 0; time < 2; ++time) {
    ptx::wgmma_fence();
    device::issue_ab<kDepth, kColsAtOnce>(r_sum, s.a, 0, s.b, 0, true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(r_sum.r[0]);
  }
  dump(r_sum, g_sum, kCols, ptx::warp_index() * device::kBlockRows, 0);
#endif
}

// Twice a b, both from shared memory, by products of kColsAtOnce columns.
template <typename Element, int kCols, int kColsAtOnce>
void test_ab_in_parts() {
  constexpr int kDepth = 64;
  constexpr int kRows = device::kWarpgroupRows;
  using Memory = ProductMemory<SmemTile<Element, kRows, kDepth>, SmemTile<Element, kDepth, kCols>>;
  Managed<Element> a(kRows * kDepth);
  Managed<Element> b(kDepth * kCols);
  Managed<float> sum(kRows * kCols, kUntouched);
  fill(a, 8);
  fill(b, 9);
  run<ab_in_parts_kernel<Element, kCols, kColsAtOnce>>(1, device::kWarpgroupThreads, sizeof(Memory),
                                                       a.data, b.data, sum.data);
  expect(
      "issue_ab " + shape_name(kRows, kCols) + ", " + std::to_string(kColsAtOnce) +
          " columns at once",
      kRows, kCols, 0, [&](int r, int c) { return sum[r * kCols + c]; },
      [&](int r, int c) {
        float expected = 0.0f;
        for (int i = 0; i < kDepth; ++i) {
          expected +=
              2.0f * static_cast<float>(a[r * kDepth + i]) * static_cast<float>(b[i * kCols + c]);
        }
        return expected;
      });
}

template <typename Element, int kCols, int kColsB, int kCol>
__global__ void atb_kernel(const Element* g_a, const Element* g_b, float* g_sum) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kDepth = 64;
  auto& s = device::shared_memory<ProductMemory<SmemTile<Element, kDepth, device::kWarpgroupRows>,
                                                SmemTile<Element, kDepth, kColsB>>>();
  fill_tile(s.a, g_a);
  fill_tile(s.b, g_b);
  ptx::fence_async_proxy();
  __syncthreads();
  device::Accumulator<device::kBlockRows, kCols> r_sum;
  ptx::wgmma_fence();
  device::issue_atb(r_sum, s.a, s.b, kCol);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_pin(r_sum.r[0]);
  dump(r_sum, g_sum, kCols, ptx::warp_index() * device::kBlockRows, 0);
#endif
}

// a^T by kCols columns of b from kCol on.
template <typename Element, int kCols, int kColsB, int kCol>
void test_atb() {
  constexpr int kDepth = 64;
  constexpr int kRows = device::kWarpgroupRows;
  using Memory = ProductMemory<SmemTile<Element, kDepth, kRows>, SmemTile<Element, kDepth, kColsB>>;
  Managed<Element> a(kDepth * kRows);
  Managed<Element> b(kDepth * kColsB);
  Managed<float> sum(kRows * kCols, kUntouched);
  fill(a, 10);
  fill(b, 11);
  run<atb_kernel<Element, kCols, kColsB, kCol>>(1, device::kWarpgroupThreads, sizeof(Memory),
                                                a.data, b.data, sum.data);
  expect(
      "issue_atb, " + std::to_string(kCols) + " columns from " + std::to_string(kCol) + " on of " +
          shape_name(kDepth, kColsB),
      kRows, kCols, 0, [&](int r, int c) { return sum[r * kCols + c]; },
      [&](int r, int c) {
        float expected = 0.0f;
        for (int i = 0; i < kDepth; ++i) {
          expected +=
              static_cast<float>(a[i * kRows + r]) * static_cast<float>(b[i * kColsB + kCol + c]);
        }
        return expected;
      });
}

// --- the ring ---

struct RingMemory {
  device::Ring<4> ring;
  int numbers[4];
};

// A producer warp hands numbers to three consumer warps, which add them up.
__global__ void ring_kernel(int count, int* g_sums) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kConsumers = 3;
  auto& s = device::shared_memory<RingMemory>();
  if (threadIdx.x == 0) {
    s.ring.init(kConsumers);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  device::RingPosition<4> at;
  int sum = 0;
  for (int i = 0; i < count; ++i) {
    if (ptx::warp_index() == 0) {
      at.wait_empty(s.ring);
      if (ptx::lane_index() == 0) {
        s.numbers[at.stage()] = i;
        at.expect(s.ring, 0);
      }
      __syncwarp();
    } else {
      at.wait(s.ring);
      sum += s.numbers[at.stage()];
      __syncwarp();
      at.release(s.ring);
    }
    at.advance();
  }
  g_sums[threadIdx.x] = sum;
#endif
}

void test_ring() {
  constexpr int kCount = 1001;
  Managed<int> sums(128, -1);
  run<ring_kernel>(1, 128, sizeof(RingMemory), kCount, sums.data);
  expect(
      "Ring", 1, 128, 0, [&](int, int thread) { return sums[thread]; },
      [](int, int thread) { return thread < ptx::kWarpSize ? 0 : kCount * (kCount - 1) / 2; });
}

struct TwoRingsMemory {
  device::Ring<2> pairs_ring;
  device::Ring<4> singles_ring;
  int pairs[2][2];
  int singles[4];
};

// The same through two rings at once. A stage of the first is filled by two threads, and consumers
// hold it until they have the next: they read it once more before they release it.
__global__ void two_rings_kernel(int count, int* g_sums) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kConsumers = 3;
  auto& s = device::shared_memory<TwoRingsMemory>();
  if (threadIdx.x == 0) {
    s.pairs_ring.init(kConsumers, 2);
    s.singles_ring.init(kConsumers);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int lane = ptx::lane_index();
  device::RingPosition<2> pairs_at;
  device::RingPosition<4> singles_at;
  int sum = 0;
  int held = 0;
  for (int i = 0; i < count; ++i) {
    const auto& s_pair = s.pairs[pairs_at.stage()];
    if (ptx::warp_index() == 0) {
      pairs_at.wait_empty(s.pairs_ring);
      if (lane < 2) {
        s.pairs[pairs_at.stage()][lane] = (1 + lane) * i;
        pairs_at.fill(s.pairs_ring);
      }
      singles_at.wait_empty(s.singles_ring);
      if (lane == 0) {
        s.singles[singles_at.stage()] = 3 * i;
        singles_at.fill(s.singles_ring);
      }
      __syncwarp();
    } else {
      pairs_at.wait_both(s.pairs_ring, singles_at, s.singles_ring);
      sum += s_pair[0] + s_pair[1] + s.singles[singles_at.stage()];
      if (i > 0) {
        sum += s.pairs[held][0] + s.pairs[held][1];
        __syncwarp();
        pairs_at.release_previous(s.pairs_ring);
      }
      held = pairs_at.stage();
      __syncwarp();
      singles_at.release(s.singles_ring);
    }
    pairs_at.advance();
    singles_at.advance();
  }
  g_sums[threadIdx.x] = sum;
#endif
}

void test_two_rings() {
  constexpr int kCount = 1001;
  Managed<int> sums(128, -1);
  run<two_rings_kernel>(1, 128, sizeof(TwoRingsMemory), kCount, sums.data);
  expect(
      "Ring, filled by several, wait_both, release_previous", 1, 128, 0,
      [&](int, int thread) { return sums[thread]; },
      [](int, int thread) {  // all pairs twice but the last
        constexpr int kNumbers = kCount * (kCount - 1) / 2;
        return thread < ptx::kWarpSize ? 0 : (6 + 3) * kNumbers - 3 * (kCount - 1);
      });
}

// --- stmatrix ---

FA_HOST_DEVICE float pattern(int row, int col) {
  return static_cast<float>((5 * row + 3 * col) % 101);
}

// Four warps store pattern() to the last 64 rows of the tile, from kCol on.
template <int kCol, int kCols, typename Element, typename Tile>
__global__ void store_blocks_kernel(Element* g_tile) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  auto& s_tile = device::shared_memory<Tile>();
  fill_tile(s_tile, g_tile);
  __syncthreads();
  const int row = Tile::kRows - device::kWarpgroupRows + ptx::warp_index() * device::kBlockRows;
  device::Accumulator<device::kBlockRows, kCols> r_sums;
  r_sums.transform([&](float, int i, int block, int j) {
    return pattern(row + r_sums.row(i), kCol + r_sums.col(block, j));
  });
  device::store_blocks(device::to_operand<Element>(r_sums), s_tile, row, kCol);
  __syncthreads();
  dump_tile(s_tile, g_tile);
#endif
}

template <typename Element, int kCol, int kCols, int kTileCols>
void test_store_blocks() {
  constexpr int kRows = 80;
  using Tile = SmemTile<Element, kRows, kTileCols>;
  Managed<Element> tile(kRows * kTileCols, Element(kUntouched));
  run<store_blocks_kernel<kCol, kCols, Element, Tile>>(1, device::kWarpgroupThreads, sizeof(Tile),
                                                       tile.data);
  expect(
      "store_blocks, " + std::to_string(kCols) + " columns from " + std::to_string(kCol) +
          " on of " + shape_name(kRows, kTileCols),
      kRows, kTileCols, 0,
      [&](int r, int c) { return static_cast<float>(tile[r * kTileCols + c]); },
      [](int r, int c) {
        const bool stored = r >= kRows - device::kWarpgroupRows && kCol <= c && c < kCol + kCols;
        return stored ? pattern(r, c) : kUntouched;
      });
}

// Eight warps have 16 columns of pattern() each as their rows.
template <typename Element, typename Tile>
__global__ void store_transposed_kernel(Element* g_tile) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  auto& s_tile = device::shared_memory<Tile>();
  const int col = ptx::warp_index() * device::kBlockRows;
  device::Accumulator<device::kBlockRows, Tile::kRows> r_sums;
  r_sums.transform([&](float, int i, int block, int j) {
    return pattern(r_sums.col(block, j), col + r_sums.row(i));
  });
  device::store_transposed(device::to_operand<Element>(r_sums), s_tile, col);
  __syncthreads();
  dump_tile(s_tile, g_tile);
#endif
}

template <typename Element, int kRows>
void test_store_transposed() {
  constexpr int kCols = 128;
  using Tile = SmemTile<Element, kRows, kCols>;
  Managed<Element> tile(kRows * kCols, Element(kUntouched));
  run<store_transposed_kernel<Element, Tile>>(1, 256, sizeof(Tile), tile.data);
  expect(
      "store_transposed to " + shape_name(kRows, kCols), kRows, kCols, 0,
      [&](int r, int c) { return static_cast<float>(tile[r * kCols + c]); },
      [](int r, int c) { return pattern(r, c); });
}

// --- from registers to global memory ---

// Four warps store pattern() as rows of a matrix, as far as it has `rows` and `cols`.
template <int kCols, typename Element>
__global__ void store_rows_kernel(Element* g_matrix, int row_stride, int rows, int cols) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const int row = ptx::warp_index() * device::kBlockRows;
  device::Accumulator<device::kBlockRows, kCols> r_sums;
  r_sums.transform([&](float, int i, int block, int j) {
    return pattern(row + r_sums.row(i), r_sums.col(block, j));
  });
  const device::GlobalTile<Element> destination = {g_matrix + row * row_stride, row_stride,
                                                   rows - row, cols};
  device::store_rows<kCols>(destination, [&](int block, int half) {
    const float (&r)[4] = r_sums.r[0][block];
    return ptx::convert_pair<Element>(r[2 * half], r[2 * half + 1]);
  });
#endif
}

template <typename Element, int kCols>
void test_store_rows(int rows, int cols) {
  constexpr int kRows = device::kWarpgroupRows;
  constexpr int kStride = kCols + 8;
  Managed<Element> matrix(kRows * kStride, Element(kUntouched));
  run<store_rows_kernel<kCols, Element>>(1, device::kWarpgroupThreads, 0, matrix.data, kStride,
                                         rows, cols);
  expect(
      "store_rows of " + std::to_string(kCols) + " columns to " + shape_name(rows, cols), kRows,
      kStride, 0, [&](int r, int c) { return static_cast<float>(matrix[r * kStride + c]); },
      [&](int r, int c) { return r < rows && c < cols ? pattern(r, c) : kUntouched; });
}

template <typename Element>
void test_element(const char* name) {
  std::printf("%s\n", name);
  test_tma<Element, 128, 64>(300, 64, 0);
  test_tma<Element, 128, 128>(200, 128, 128);  // rows past the end
  test_tma<Element, 64, 128>(96, 80, 8);       // columns past the end
  test_tma<Element, 80, 256>(96, 200, 0);      // a panel past the end
  test_tma<Element, 128, 64>(20, 40, 32);      // nothing but zeros
  test_shared_heads<Element>();
  test_abt<Element, 128, 64, 64>();
  test_abt<Element, 128, 128, 96>();
  test_abt<Element, 128, 128, 128>();
  test_abt<Element, 192, 128, 128>();
  test_abt<Element, 112, 192, 192>();
  test_abt<Element, 80, 256, 256>();
  test_abt<Element, 96, 256, 256>();
  test_ab<Element, 128, 64, 64>();
  test_ab<Element, 128, 128, 96>();
  test_ab<Element, 128, 128, 128>();
  test_ab<Element, 112, 192, 192>();
  test_ab<Element, 80, 256, 256>();
  // Parts of tiles of keys.
  test_abt<Element, 64, 192, 192, 112>();
  test_abt<Element, 48, 256, 256, 80>();
  test_ab<Element, 64, 192, 192, 112>();
  test_ab<Element, 48, 256, 256, 80>();
  test_ab<Element, 64, 64, 48>();

  // Parts of rows, and of columns, both from shared memory.
  test_ab_of_part<Element, 64, 128, 0>();
  test_ab_of_part<Element, 64, 128, 64>();
  test_ab_of_part<Element, 128, 64, 0>();

  test_ab_in_parts<Element, 192, 192>();
  test_ab_in_parts<Element, 256, 128>();
  test_atb<Element, 128, 256, 0>();
  test_atb<Element, 128, 256, 128>();
  test_atb<Element, 64, 192, 128>();

  test_store_blocks<Element, 0, 64, 64>();
  test_store_blocks<Element, 0, 64, 128>();
  test_store_blocks<Element, 64, 64, 128>();
  test_store_blocks<Element, 0, 96, 96>();
  test_store_blocks<Element, 0, 96, 128>();
  test_store_blocks<Element, 0, 128, 128>();
  test_store_blocks<Element, 0, 192, 192>();
  test_store_blocks<Element, 0, 256, 256>();
  test_store_transposed<Element, 64>();
  test_store_transposed<Element, 128>();

  test_store_rows<Element, 192>(64, 192);
  test_store_rows<Element, 256>(64, 256);
  test_store_rows<Element, 256>(45, 200);  // rows and columns past the end
  test_store_rows<Element, 256>(8, 136);   // warps of which no row exists
}

void test_all() {
  test_ring();
  test_two_rings();
  test_element<__nv_bfloat16>("bfloat16");
  test_element<__half>("float16");
}

}  // namespace

int main() { return run_tests(test_all, 90); }
