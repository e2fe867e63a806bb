// SPDX-License-Identifier: BSD-3-Clause
// What the tests of device code need: memory that both sides see, launches, and comparisons that
// print a line each. Included by CUDA sources only.
#pragma once

#include <cmath>
#include <cstdio>
#include <exception>
#include <string>

#include "support/cuda_check.h"

namespace fa::test {

inline constexpr float kUntouched = -77.0f;  // exact in every type

inline int& failures() {
  static int count = 0;
  return count;
}

inline std::string shape_name(int rows, int cols) {
  return std::to_string(rows) + "x" + std::to_string(cols);
}

// The main function of a test: 0 if all checks of test_all() hold, 1 if one does not, 77 without a
// GPU, or without one of the compute capability `only`, such as 90.
template <typename Tests>
int run_tests(Tests&& test_all, int only = 0) {
  int devices = 0;
  int major = 0;
  int minor = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0 ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0) != cudaSuccess ||
      (only != 0 && 10 * major + minor != only)) {
    std::printf("skipped: no GPU that these tests are for\n");
    return 77;
  }
  try {
    test_all();
  } catch (const std::exception& error) {
    std::printf("FAILED %s\n", error.what());
    return 1;
  }
  std::printf("%d failed\n", failures());
  return failures() == 0 ? 0 : 1;
}

template <typename T>
struct Managed {
  explicit Managed(size_t count, T value = T{}) : size(count) {
    check_cuda(cudaMallocManaged(&data, count * sizeof(T)), "allocate");
    for (size_t i = 0; i < count; ++i) {
      data[i] = value;
    }
  }
  ~Managed() { cudaFree(data); }
  Managed(const Managed&) = delete;
  Managed& operator=(const Managed&) = delete;
  T& operator[](size_t i) { return data[i]; }
  T* data = nullptr;
  size_t size;
};

// Small integers, so that sums of products are exact.
template <typename Element>
void fill(Managed<Element>& buffer, int seed) {
  for (size_t i = 0; i < buffer.size; ++i) {
    buffer[i] = static_cast<Element>(static_cast<float>((i * 7 + i / 13 * 5 + seed) % 9) - 4.0f);
  }
}

template <auto kKernel, typename... Arguments>
void run(int blocks, int threads, size_t smem_bytes, Arguments... arguments) {
  check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(smem_bytes)),
             "set shared memory");
  kKernel<<<blocks, threads, smem_bytes>>>(arguments...);
  check_cuda(cudaGetLastError(), "launch");
  check_cuda(cudaDeviceSynchronize(), "run");
}

inline void report(const std::string& name, int wrong, int count) {
  std::printf("%-6s %s (%d wrong of %d)\n", wrong == 0 ? "ok" : "FAILED", name.c_str(), wrong,
              count);
  failures() += wrong != 0;
}

// Compares actual(row, col) with expected(row, col).
template <typename Actual, typename Expected>
void expect(const std::string& name, int rows, int cols, double tolerance, Actual&& actual,
            Expected&& expected) {
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
  report(name, wrong, rows * cols);
}

// Writes a warp's accumulator into a matrix of floats.
template <typename Sum>
__device__ void dump(const Sum& r_sum, float* g_matrix, int stride, int row, int col) {
#pragma unroll
  for (int a = 0; a < Sum::kRowBlocks; ++a) {
#pragma unroll
    for (int b = 0; b < Sum::kColBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        g_matrix[(row + Sum::row(2 * a + i / 2)) * stride + col + Sum::col(b, i)] =
            r_sum.r[a][b][i];
      }
    }
  }
}

// Between a shared tile and a matrix that is contiguous, element by element.
template <typename Tile, typename Element>
__device__ void fill_tile(Tile& s_tile, const Element* g_matrix) {
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * Tile::kCols; i += blockDim.x) {
    s_tile.elements[Tile::offset(i / Tile::kCols, i % Tile::kCols)] = g_matrix[i];
  }
}
template <typename Tile, typename Element>
__device__ void dump_tile(const Tile& s_tile, Element* g_matrix) {
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * Tile::kCols; i += blockDim.x) {
    g_matrix[i] = s_tile.elements[Tile::offset(i / Tile::kCols, i % Tile::kCols)];
  }
}

}  // namespace fa::test
