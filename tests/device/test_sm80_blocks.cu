// SPDX-License-Identifier: BSD-3-Clause
// The blocks of csrc/device and csrc/ptx under sm80, each against a loop on the host. One warp per
// test; small integers, so that products are exact. Prints a line per check; returns 0 if all hold,
// 1 if one does not, 77 without a GPU.
#include <cmath>
#include <cstdio>
#include <functional>
#include <vector>

#include "device/convert.cuh"
#include "device/epilogue.cuh"
#include "device/mask.cuh"
#include "device/softmax.cuh"
#include "device/warp_mma.cuh"
#include "support/cuda_check.h"

namespace {

using namespace fa;

constexpr int kRows = 64;  // of tiles
constexpr int kDepth = 128;
constexpr int kKeys = 64;
constexpr float kUntouched = -12345.0f;

int g_failures = 0;

// A device buffer that the host sees too.
template <typename T>
struct Managed {
  explicit Managed(size_t count) : size(count) {
    check_cuda(cudaMallocManaged(&data, count * sizeof(T)), "allocate");
  }
  ~Managed() { cudaFree(data); }
  Managed(const Managed&) = delete;
  Managed& operator=(const Managed&) = delete;
  T& operator[](size_t i) { return data[i]; }
  T* data = nullptr;
  size_t size;
};

void synchronize() {
  check_cuda(cudaGetLastError(), "launch");
  check_cuda(cudaDeviceSynchronize(), "run");
}

void expect(const char* name, int rows, int cols, double tolerance,
            const std::function<double(int, int)>& actual,
            const std::function<double(int, int)>& expected) {
  int wrong = 0;
  for (int row = 0; row < rows; ++row) {
    for (int col = 0; col < cols; ++col) {
      const double a = actual(row, col);
      const double e = expected(row, col);
      const bool equal = a == e || std::abs(a - e) <= tolerance;
      if (!equal && wrong++ == 0) {
        std::printf("  first: (%d, %d) is %g, expected %g\n", row, col, a, e);
      }
    }
  }
  std::printf("%-6s %s (%d wrong of %d)\n", wrong == 0 ? "ok" : "FAILED", name, wrong, rows * cols);
  g_failures += wrong != 0;
}

template <typename Element>
void fill(Managed<Element>& buffer, int seed) {
  for (size_t i = 0; i < buffer.size; ++i) {
    buffer[i] = static_cast<Element>(static_cast<float>((i * 7 + i / 13 * 5 + seed) % 9) - 4.0f);
  }
}

template <int kCols>
__device__ void dump(const device::Accumulator<kCols>& r_tile, float* g_out) {
  for (int block = 0; block < kCols / 8; ++block) {
    for (int i = 0; i < 4; ++i) {
      g_out[device::accumulator_row(i / 2) * kCols + device::accumulator_col(block, i)] =
          r_tile.r[block][i];
    }
  }
}

template <typename Element>
using Tile = device::SmemTile<Element, kRows, kDepth>;

template <typename Element>
__global__ void load_kernel(device::GlobalTile<Element> source, Element* g_out) {
  auto& s_tile = device::shared_memory<Tile<Element>>();
  s_tile.template load_async<128>(source);
  ptx::cp_async_wait_all();
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kDepth; i += 128) {
    g_out[i] = *s_tile.at(i / kDepth, i % kDepth);
  }
}

template <typename Element>
void test_load() {
  const int rows = 50;
  const int cols = 72;
  const int stride = 80;
  Managed<Element> source(rows * stride);
  Managed<Element> out(kRows * kDepth);
  fill(source, 1);
  for (int row = 0; row < rows; ++row) {
    for (int col = cols; col < stride; ++col) {
      source[row * stride + col] = static_cast<Element>(NAN);
    }
  }
  load_kernel<Element>
      <<<1, 128, sizeof(Tile<Element>)>>>({source.data, stride, rows, cols}, out.data);
  synchronize();
  expect(
      "SmemTile::load_async, zero fill", kRows, kDepth, 0,
      [&](int r, int c) { return static_cast<float>(out[r * kDepth + c]); },
      [&](int r, int c) {
        return r < rows && c < cols ? static_cast<float>(source[r * stride + c]) : 0.0f;
      });
}

// mode 0: a b^T, a in shared memory; 1: a b^T, a in registers; 2: a b.
template <typename Element, int kMode>
__global__ void product_kernel(const Element* g_a, const Element* g_b, int a_row, float* g_out) {
  struct Plan {
    Tile<Element> a;
    Tile<Element> b;
    device::SmemTile<Element, kDepth, kKeys> b_of_ab;
  };
  auto& s = device::shared_memory<Plan>();
  for (int i = threadIdx.x; i < kRows * kDepth; i += 32) {
    *s.a.at(i / kDepth, i % kDepth) = g_a[i];
    *s.b.at(i / kDepth, i % kDepth) = g_b[i];
    *s.b_of_ab.at(i / kKeys, i % kKeys) = g_b[i];
  }
  __syncthreads();
  device::Accumulator<kKeys> r_sum;
  r_sum.clear();
  if constexpr (kMode == 0) {
    device::accumulate_abt(r_sum, s.a, a_row, s.b);
  } else {
    const auto r_a = device::load_rows(s.a, a_row);
    if constexpr (kMode == 1) {
      device::accumulate_abt(r_sum, r_a, s.b);
    } else {
      device::accumulate_ab(r_sum, r_a, s.b_of_ab);
    }
  }
  dump(r_sum, g_out);
}

template <typename Element, int kMode>
void test_product(const char* name) {
  Managed<Element> a(kRows * kDepth);
  Managed<Element> b(kRows * kDepth);
  Managed<float> out(16 * kKeys);
  fill(a, 2);
  fill(b, 5);
  const int a_row = 32;
  const int smem = 3 * sizeof(Tile<Element>);
  check_cuda(cudaFuncSetAttribute(product_kernel<Element, kMode>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, smem),
             "set shared memory");
  product_kernel<Element, kMode><<<1, 32, smem>>>(a.data, b.data, a_row, out.data);
  synchronize();
  expect(
      name, 16, kKeys, 0, [&](int r, int c) { return out[r * kKeys + c]; },
      [&](int r, int c) {
        double sum = 0;
        for (int k = 0; k < kDepth; ++k) {
          const int index = kMode == 2 ? k * kKeys + c : c * kDepth + k;
          sum += static_cast<float>(a[(a_row + r) * kDepth + k]) * static_cast<float>(b[index]);
        }
        return sum;
      });
}

// p (16, 64) times the identity, from accumulators: only right if the accumulator map, to_operand
// and the B layout agree. The result leaves through store_rows.
template <typename Element>
__global__ void operand_kernel(device::GlobalTile<Element> destination) {
  using Square = device::SmemTile<Element, kKeys, kKeys>;
  auto& s_tile = device::shared_memory<Square>();
  for (int i = threadIdx.x; i < kKeys * kKeys; i += 32) {
    *s_tile.at(i / kKeys, i % kKeys) = static_cast<Element>(i / kKeys == i % kKeys ? 1.0f : 0.0f);
  }
  __syncthreads();
  device::Accumulator<kKeys> r_p;
  r_p.transform([](float, int row, int block, int i) {
    return static_cast<float>(
        (5 * device::accumulator_row(row) + 3 * device::accumulator_col(block, i)) % 101);
  });
  device::Accumulator<kKeys> r_sum;
  r_sum.clear();
  device::accumulate_ab(r_sum, device::to_operand<Element>(r_p), s_tile);
  __syncthreads();
  device::store_rows(r_sum, s_tile, 16, destination);
}

template <typename Element>
void test_operand() {
  const int stride = 72;
  const int rows = 16 + 11;  // of the tile; the warp has rows 16 .. 31 of it
  const int cols = 40;
  Managed<Element> out(kRows * stride);
  for (size_t i = 0; i < out.size; ++i) {
    out[i] = static_cast<Element>(kUntouched);
  }
  const float untouched = static_cast<float>(static_cast<Element>(kUntouched));
  operand_kernel<Element><<<1, 32, kKeys * kKeys * 2>>>({out.data, stride, rows, cols});
  synchronize();
  expect(
      "to_operand, accumulate_ab, store_rows", kRows, stride, 0,
      [&](int r, int c) { return static_cast<float>(out[r * stride + c]); },
      [&](int r, int c) {
        return r >= 16 && r < rows && c < cols ? (5 * (r - 16) + 3 * c) % 101 : untouched;
      });
}

template <bool kTransposed>
__global__ void mask_kernel(WindowMask window, int first_row, int first_col, float* g_out) {
  device::Accumulator<kKeys> r_tile;
  r_tile.transform([](float, int, int, int) { return 1.0f; });
  device::keep_visible(r_tile, first_row, first_col, -INFINITY, [&](int row) {
    return kTransposed ? device::queries_seeing_any<MaskMode::kWindow>(window, {row, row + 1})
                       : device::keys_seen_by_any<MaskMode::kWindow>(window, {row, row + 1});
  });
  dump(r_tile, g_out);
}

void test_mask() {
  Managed<float> out(16 * kKeys);
  const WindowMask window(40, 75, 20, 9);
  mask_kernel<false><<<1, 32>>>(window, 16, 32, out.data);
  synchronize();
  expect(
      "keep_visible, queries against keys", 16, kKeys, 0,
      [&](int r, int c) { return out[r * kKeys + c]; },
      [&](int r, int c) { return window.allows(16 + r, 32 + c) ? 1.0 : -INFINITY; });
  mask_kernel<true><<<1, 32>>>(window, 48, 0, out.data);
  synchronize();
  expect(
      "keep_visible, keys against queries", 16, kKeys, 0,
      [&](int r, int c) { return out[r * kKeys + c]; },
      [&](int r, int c) { return c < 40 && window.allows(c, 48 + r) ? 1.0 : -INFINITY; });
}

constexpr int kTiles = 3;

__global__ void softmax_kernel(const float* g_scores, float scale, float* g_lse, float* g_sum) {
  device::OnlineSoftmax softmax(scale);
  float r_sum[2] = {0, 0};  // of p, rescaled as out is
  for (int tile = 0; tile < kTiles; ++tile) {
    device::Accumulator<kKeys> r_scores;
    r_scores.transform([&](float, int row, int block, int i) {
      return g_scores[(tile * 16 + device::accumulator_row(row)) * kKeys +
                      device::accumulator_col(block, i)];
    });
    float rescale[2];
    softmax.update(r_scores, rescale);
    r_sum[0] *= rescale[0];
    r_sum[1] *= rescale[1];
    r_scores.transform([&](float p, int row, int, int) {
      r_sum[row] += p;
      return p;
    });
  }
  float lse[2];
  float normalizer[2];
  softmax.finalize(lse, normalizer);
  device::store_row_values(lse, g_lse, 0, 16);
  for (int row = 0; row < 2; ++row) {
    r_sum[row] = device::row_sum(r_sum[row]) * normalizer[row];
  }
  device::store_row_values(r_sum, g_sum, 0, 16);
}

void test_softmax() {
  Managed<float> scores(kTiles * 16 * kKeys);
  Managed<float> lse(16);
  Managed<float> sum(16);
  for (size_t i = 0; i < scores.size; ++i) {
    const int row = static_cast<int>(i) / kKeys % 16;
    const int tile = static_cast<int>(i) / (16 * kKeys);
    const bool masked = row == 3 || (row == 5 && tile == 0) || (row == 6 && tile > 0);
    scores[i] = masked ? -INFINITY : static_cast<float>((i * 37 + i / 64 * 11) % 401) - 200.0f;
  }
  const float scale = 0.25f;
  softmax_kernel<<<1, 32>>>(scores.data, scale, lse.data, sum.data);
  synchronize();
  const auto expected = [&](int row) {
    double total = 0;
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int key = 0; key < kKeys; ++key) {
        total += std::exp(double{scale} * scores[(tile * 16 + row) * kKeys + key]);
      }
    }
    return std::log(total);
  };
  expect(
      "OnlineSoftmax, lse", 16, 1, 1e-4, [&](int r, int) { return lse[r]; },
      [&](int r, int) { return expected(r); });
  expect(
      "OnlineSoftmax, rows sum to one", 16, 1, 1e-5, [&](int r, int) { return sum[r]; },
      [&](int r, int) { return r == 3 ? 0.0 : 1.0; });
}

template <typename Element>
void test_element(const char* name) {
  std::printf("%s\n", name);
  test_load<Element>();
  test_product<Element, 0>("accumulate_abt, a in shared memory");
  test_product<Element, 1>("accumulate_abt, a in registers");
  test_product<Element, 2>("accumulate_ab, transposed ldmatrix");
  test_operand<Element>();
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no GPU\n");
    return 77;
  }
  test_element<__nv_bfloat16>("bfloat16");
  test_element<__half>("float16");
  test_mask();
  test_softmax();
  std::printf("%d failed\n", g_failures);
  return g_failures == 0 ? 0 : 1;
}
