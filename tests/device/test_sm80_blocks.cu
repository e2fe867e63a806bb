// SPDX-License-Identifier: BSD-3-Clause
// The blocks of csrc/device and csrc/ptx under sm80, each against a loop on the host. Prints a line
// per check; returns 0 if all hold, 1 if one does not, 77 without a GPU.
#include <cstdio>
#include <random>
#include <string>
#include <type_traits>

#include "device/convert.cuh"
#include "device/warp_grid.cuh"
#include "device/warp_mma.cuh"
#include "device/work_order.cuh"
#include "tests/support/cuda_softmax_tests.h"
#include "tests/support/cuda_tile_tests.h"

namespace {

using namespace fa;
using namespace fa::test;
using device::SmemTile;
using device::WarpGrid;

enum class Product { kAbt, kAb, kAtb };

constexpr const char* name_of(Product product) {
  return product == Product::kAbt  ? "accumulate_abt"
         : product == Product::kAb ? "accumulate_ab"
                                   : "accumulate_atb";
}

// The operands of a (kRows, kCols) product as they lie in memory.
template <typename Element, Product kProduct, int kRows, int kCols, int kDepth>
struct Operands {
  using A = std::conditional_t<kProduct == Product::kAtb, SmemTile<Element, kDepth, kRows>,
                               SmemTile<Element, kRows, kDepth>>;
  using B = std::conditional_t<kProduct == Product::kAbt, SmemTile<Element, kCols, kDepth>,
                               SmemTile<Element, kDepth, kCols>>;
  A a;
  B b;

  static int index_a(int row, int k) {
    return kProduct == Product::kAtb ? k * kRows + row : row * kDepth + k;
  }
  static int index_b(int k, int col) {
    return kProduct == Product::kAbt ? col * kDepth + k : k * kCols + col;
  }
};

// Leading warps write to g_led, the others to g_copies; the sum begins with ones.
template <typename Element, Product kProduct, int kRows, int kCols, int kDepth, int kWarps>
__global__ void product_kernel(const Element* g_a, const Element* g_b, float* g_led,
                               float* g_copies, int* g_leaders) {
  using Grid = WarpGrid<kRows, kCols, kWarps>;
  auto& s = device::shared_memory<Operands<Element, kProduct, kRows, kCols, kDepth>>();
  fill_tile(s.a, g_a);
  fill_tile(s.b, g_b);
  __syncthreads();
  typename Grid::Sum r_sum;
  r_sum.transform([](float, int, int, int) { return 1.0f; });
  if constexpr (kProduct == Product::kAbt) {
    device::accumulate_abt(r_sum, s.a, Grid::row(), s.b, Grid::col());
  } else if constexpr (kProduct == Product::kAb) {
    device::accumulate_ab(r_sum, s.a, Grid::row(), s.b, Grid::col());
  } else {
    device::accumulate_atb(r_sum, s.a, Grid::row(), s.b, Grid::col());
  }
  dump(r_sum, Grid::leads() ? g_led : g_copies, kCols, Grid::row(), Grid::col());
  if (Grid::leads() && ptx::lane_index() == 0) {
    atomicAdd(g_leaders, 1);
  }
}

template <typename Element, Product kProduct, int kRows, int kCols, int kDepth, int kWarps>
void test_product() {
  using Plan = Operands<Element, kProduct, kRows, kCols, kDepth>;
  using Grid = WarpGrid<kRows, kCols, kWarps>;
  Managed<Element> a(kRows * kDepth);
  Managed<Element> b(kDepth * kCols);
  Managed<float> led(kRows * kCols, kUntouched);
  Managed<float> copies(kRows * kCols, kUntouched);
  Managed<int> leaders(1);
  fill(a, 2);
  fill(b, 5);
  run<product_kernel<Element, kProduct, kRows, kCols, kDepth, kWarps>>(
      1, 32 * kWarps, sizeof(Plan), a.data, b.data, led.data, copies.data, leaders.data);
  const auto expected = [&](int row, int col) {
    double sum = 1;
    for (int k = 0; k < kDepth; ++k) {
      sum += static_cast<double>(static_cast<float>(a[Plan::index_a(row, k)])) *
             static_cast<float>(b[Plan::index_b(k, col)]);
    }
    return sum;
  };
  const std::string name = std::string(name_of(kProduct)) + " " + shape_name(kRows, kCols) +
                           " over " + std::to_string(kDepth) + ", " + std::to_string(kWarps) +
                           " warps as " + shape_name(Grid::kRowWarps, Grid::kColWarps);
  expect(name, kRows, kCols, 0, [&](int r, int c) { return led[r * kCols + c]; }, expected);
  // Each element has one leader: together they cover the tile, and there are no more than that.
  const int needed = kRows * kCols / (Grid::kRows * Grid::kCols);
  expect(
      name + ", leaders", 1, 1, 0, [&](int, int) { return leaders[0]; },
      [&](int, int) { return needed; });
  if (needed < kWarps) {
    expect(
        name + ", copies", kRows, kCols, 0, [&](int r, int c) { return copies[r * kCols + c]; },
        [&](int r, int c) {
          return copies[r * kCols + c] == kUntouched ? kUntouched : expected(r, c);
        });
  }
}

template <typename Element, int kRows, int kCols, int kDepth, int kWarps>
void test_products() {
  test_product<Element, Product::kAbt, kRows, kCols, kDepth, kWarps>();
  test_product<Element, Product::kAb, kRows, kCols, kDepth, kWarps>();
  test_product<Element, Product::kAtb, kRows, kCols, kDepth, kWarps>();
}

// The exactness of products with all bits of the factors, and of those that round them: an error
// relative to the sum of magnitudes.
template <typename Element>
void test_exactness(const char* name, double bound) {
  constexpr int kRows = 64;
  constexpr int kCols = 64;
  constexpr int kDepth = 256;
  using Plan = Operands<Element, Product::kAbt, kRows, kCols, kDepth>;
  Managed<Element> a(kRows * kDepth);
  Managed<Element> b(kDepth * kCols);
  Managed<float> led(kRows * kCols);
  Managed<float> copies(kRows * kCols);
  Managed<int> leaders(1);
  std::mt19937 generator(7);
  std::uniform_real_distribution<float> uniform(0.5f, 2.0f);  // sums only grow
  for (Managed<Element>* operand : {&a, &b}) {
    for (size_t i = 0; i < operand->size; ++i) {
      (*operand)[i] = static_cast<Element>(uniform(generator));
    }
  }
  run<product_kernel<Element, Product::kAbt, kRows, kCols, kDepth, 4>>(
      1, 128, sizeof(Plan), a.data, b.data, led.data, copies.data, leaders.data);
  expect(
      std::string("exactness of ") + name, kRows, kCols, bound,
      [&](int row, int col) {
        double sum = 1;
        for (int k = 0; k < kDepth; ++k) {
          sum += static_cast<double>(static_cast<float>(a[Plan::index_a(row, k)])) *
                 static_cast<float>(b[Plan::index_b(k, col)]);
        }
        return led[row * kCols + col] / sum - 1;
      },
      [](int, int) { return 0; });
}

FA_DEVICE float pattern(int row, int col) { return static_cast<float>((5 * row + 3 * col) % 101); }
int host_pattern(int row, int col) { return (5 * row + 3 * col) % 101; }

// p (kRows, kDepth) times b, p from accumulators: only right if the accumulator map, to_operand and
// the B layout agree. Warps side by side share p and take turns in slices of columns.
template <typename Element, int kRows, int kCols, int kDepth, int kColWarps>
__global__ void operand_kernel(const Element* g_b, float* g_out) {
  auto& s_b = device::shared_memory<SmemTile<Element, kDepth, kCols>>();
  fill_tile(s_b, g_b);
  __syncthreads();
  using P = device::Accumulator<kRows, kDepth>;
  P r_p;
  r_p.transform(
      [](float, int row, int block, int i) { return pattern(P::row(row), P::col(block, i)); });
  device::Accumulator<kRows, kCols / kColWarps, 16, 16 * kColWarps> r_sum;
  r_sum.clear();
  const int col = ptx::warp_index() * 16;
  device::accumulate_ab(r_sum, device::to_operand<Element>(r_p), s_b, col);
  dump(r_sum, g_out, kCols, 0, col);
}

template <typename Element, int kRows, int kCols, int kDepth, int kColWarps>
void test_operand() {
  Managed<Element> b(kDepth * kCols);
  Managed<float> out(kRows * kCols, kUntouched);
  fill(b, 3);
  run<operand_kernel<Element, kRows, kCols, kDepth, kColWarps>>(
      1, 32 * kColWarps, sizeof(SmemTile<Element, kDepth, kCols>), b.data, out.data);
  expect(
      "to_operand, accumulate_ab " + shape_name(kRows, kCols) + " over " + std::to_string(kDepth) +
          ", " + std::to_string(kColWarps) + " side by side",
      kRows, kCols, 0, [&](int r, int c) { return out[r * kCols + c]; },
      [&](int r, int c) {
        double sum = 0;
        for (int k = 0; k < kDepth; ++k) {
          sum += host_pattern(r, k) * static_cast<float>(b[k * kCols + c]);
        }
        return sum;
      });
}

// A warp's share of pattern().
template <typename Grid>
FA_DEVICE typename Grid::Sum pattern_of() {
  typename Grid::Sum r_sum;
  r_sum.transform([](float, int row, int block, int i) {
    return pattern(Grid::row() + Grid::Sum::row(row), Grid::col() + Grid::Sum::col(block, i));
  });
  return r_sum;
}

template <typename Grid>
__global__ void add_kernel(float* g_sums) {
  Grid::add(g_sums, pattern_of<Grid>());
}

template <typename Grid>
__global__ void load_kernel(const float* g_sums, float* g_out, int cols) {
  typename Grid::Sum r_sum;
  Grid::load(g_sums, r_sum);
  dump(r_sum, g_out, cols, Grid::row(), Grid::col());
}

template <typename Element, typename Grid, typename Tile>
__global__ void store_kernel(Element* g_tile) {
  auto& s_tile = device::shared_memory<Tile>();
  const auto r_sum = pattern_of<Grid>();
  if (Grid::leads()) {
    device::store_elements(r_sum, s_tile, Grid::row(), Grid::col());
  }
  __syncthreads();
  dump_tile(s_tile, g_tile);
}

template <typename Element, int kRows, int kCols, int kWarps>
void test_grid() {
  using Grid = WarpGrid<kRows, kCols, kWarps>;
  using Tile = SmemTile<Element, kRows, kCols>;
  constexpr int kGuard = 64;
  constexpr int kBlocks = 3;  // that add the same
  constexpr int kThreads = 32 * kWarps;
  Managed<float> sums(kRows * kCols + kGuard);
  for (int i = 0; i < kGuard; ++i) {
    sums[kRows * kCols + i] = kUntouched;
  }
  Managed<float> loaded(kRows * kCols);
  Managed<Element> tile(kRows * kCols);
  run<add_kernel<Grid>>(kBlocks, kThreads, 0, sums.data);
  run<load_kernel<Grid>>(1, kThreads, 0, sums.data, loaded.data, kCols);
  run<store_kernel<Element, Grid, Tile>>(1, kThreads, sizeof(Tile), tile.data);
  const std::string name = shape_name(kRows, kCols) + ", " + std::to_string(kWarps) + " warps as " +
                           shape_name(Grid::kRowWarps, Grid::kColWarps);
  expect(
      "WarpGrid, add, load " + name, kRows, kCols, 0,
      [&](int r, int c) { return loaded[r * kCols + c]; },
      [&](int r, int c) { return kBlocks * host_pattern(r, c); });
  expect(
      "WarpGrid, add stays inside " + name, 1, kGuard, 0,
      [&](int, int i) { return sums[kRows * kCols + i]; }, [](int, int) { return kUntouched; });
  expect(
      "store_elements " + name, kRows, kCols, 0,
      [&](int r, int c) { return static_cast<float>(tile[r * kCols + c]); }, host_pattern);
}

// Each block writes its tile behind those that wrote before it, with plain loads and stores.
__global__ void turns_kernel(BwdWorkspace workspace, TileScheduler scheduler, int* g_tiles,
                             int* g_counts) {
  __shared__ int64_t s_ticket;
  const WorkTile tile = device::take_work(scheduler, workspace, s_ticket);
  device::InTurn in_turn(workspace, tile.head, [&] { return tile.tile; });
  if (threadIdx.x == blockDim.x - 1) {
    int& g_count = g_counts[tile.head];
    g_tiles[tile.head * scheduler.tiles + g_count] = tile.tile;
    ++g_count;
  }
  in_turn.end();
}

void test_turns() {
  const TileScheduler scheduler = {.tiles = 500, .heads = 7, .batch = 1};
  Managed<int> turns(BwdWorkspace::kTicketInts + scheduler.heads);
  Managed<int> tiles(scheduler.count(), -1);
  Managed<int> counts(scheduler.heads);
  BwdWorkspace workspace;
  workspace.turns = turns.data;
  run<turns_kernel>(static_cast<int>(scheduler.count()), 64, 0, workspace, scheduler, tiles.data,
                    counts.data);
  expect(
      "take_work, InTurn", scheduler.heads, scheduler.tiles, 0,
      [&](int head, int i) { return tiles[head * scheduler.tiles + i]; },
      [](int, int i) { return i; });
}

template <typename Element>
void test_element(const char* name) {
  std::printf("%s\n", name);
  test_copies<Element, 64, 128, 128>(50, 72);
  test_copies<Element, 64, 128, 256>(64, 128);
  test_copies<Element, 128, 64, 128>(1, 8);
  test_copies<Element, 64, 96, 128>(63, 96);
  test_copies<Element, 48, 96, 256>(41, 40);  // the threads do not divide the rows
  test_copies<Element, 32, 80, 128>(32, 72);
  test_copies<Element, 16, 512, 256>(16, 264);  // more threads than units of a panel
  test_copies<Element, 16, 16, 128>(9, 16);
  test_copies<Element, 32, 64, 128>(0, 64);

  test_products<Element, 64, 64, 64, 4>();
  test_products<Element, 128, 64, 32, 8>();
  test_products<Element, 64, 96, 96, 4>();
  test_products<Element, 64, 192, 64, 8>();
  test_products<Element, 32, 64, 192, 8>();
  test_products<Element, 64, 80, 16, 4>();
  test_products<Element, 32, 512, 32, 8>();
  test_products<Element, 32, 32, 256, 4>();
  test_products<Element, 16, 32, 256, 8>();  // more warps than blocks of 16 by 16
  test_products<Element, 16, 16, 512, 4>();
  test_operand<Element, 32, 64, 64, 1>();
  test_operand<Element, 16, 96, 32, 1>();
  test_operand<Element, 16, 512, 16, 2>();
  test_operand<Element, 32, 128, 128, 4>();

  test_grid<Element, 64, 64, 4>();
  test_grid<Element, 64, 128, 8>();
  test_grid<Element, 128, 96, 4>();
  test_grid<Element, 16, 512, 8>();
  test_grid<Element, 32, 80, 2>();
  test_grid<Element, 16, 32, 8>();
  test_grid<Element, 16, 16, 4>();
}

void test_all() {
  test_offsets<64, 128>();
  test_offsets<32, 96>();
  test_offsets<32, 80>();
  test_offsets<16, 16>();
  test_offsets<64, 128, float>();
  test_offsets<32, 48, float>();
  test_offsets<16, 16, float>();
  test_lanes_of<64, 128>({{0, 0, 0, 0}, {16, 0, 32, 48}, {8, 16, 40, 96}});
  test_lanes_of<32, 96>({{0, 0, 0, 0}, {16, 16, 0, 64}, {8, 64, 8, 16}});
  test_lanes_of<32, 48>({{0, 0, 0, 0}, {16, 0, 0, 32}, {0, 16, 16, 0}});
  test_element<__nv_bfloat16>("bfloat16");
  test_element<__half>("float16");
  test_element<float>("float32");
  test_element<ptx::Tf32>("tf32");
  test_exactness<float>("float32", 0x1p-21);
  test_exactness<ptx::Tf32>("tf32", 0x1p-12);  // of roundings up and down, little is left
  test_masks();
  test_softmax_of_any_scores();
  test_softmax_slack();
  test_turns();
}

}  // namespace

int main() { return run_tests(test_all); }
