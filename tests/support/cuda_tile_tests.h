// SPDX-License-Identifier: BSD-3-Clause
// Tests of shared tiles: their layout, their copies from and to global memory, and what ldmatrix
// loads from them. Included by CUDA sources only.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "device/convert.cuh"
#include "tests/support/cuda_blocks.h"

namespace fa::test {

// What the layout promises, all of which the host can tell.
template <int kRows, int kCols, typename Element = __half>
void test_offsets() {
  using Tile = device::SmemTile<Element, kRows, kCols>;
  constexpr int kUnit = Tile::kUnitElements;
  int wrong = 0;
  std::vector<int> seen(kRows * kCols);
  for (int row = 0; row < kRows; ++row) {
    for (int col = 0; col < kCols; ++col) {
      const int offset = Tile::offset(row, col);
      wrong += offset < 0 || offset >= kRows * kCols || seen[offset]++ > 0;
      wrong += offset != Tile::offset(row, col / kUnit * kUnit) + col % kUnit;
    }
  }
  report("SmemTile::offset, one place each " + shape_name(kRows, kCols), wrong, kRows * kCols);

  wrong = 0;
  for (int row = 0; row < kRows; row += 8) {
    for (int col = 0; col < kCols; col += kUnit) {
      unsigned groups = 0;
      for (int i = 0; i < 8; ++i) {
        groups |= 1u << Tile::offset(row + i, col) / kUnit % Tile::kBankGroups;
      }
      wrong += groups != 0xff;
    }
  }
  report("SmemTile::offset, banks " + shape_name(kRows, kCols), wrong, kRows * kCols / 64);

  if constexpr (Tile::kIsWide && Tile::kUnitsPerLine == Tile::kBankGroups) {
    // 8 columns of 4 rows, next to each other or every second one.
    wrong = 0;
    for (const auto [first, distance] : {std::pair(0, 1), {4, 1}, {0, 2}, {1, 2}}) {
      for (int col = 0; col < kCols; col += 8) {
        uint32_t banks = 0;
        for (int i = 0; i < 32; ++i) {
          banks |= 1u << Tile::offset(first + i / 8 * distance, col + i % 8) % 32;
        }
        wrong += banks != ~0u;
      }
    }
    report("SmemTile::offset, banks of words " + shape_name(kRows, kCols), wrong, kCols / 8 * 4);
  }

  wrong = 0;
  int steps = 0;
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < kCols; col += kUnit) {
      for (int rows = 0; row + rows < kRows; rows += Tile::kSwizzleRows) {
        for (int cols = 0; col + cols < kCols; cols += kUnit) {
          if ((col & cols) == 0) {
            ++steps;
            wrong += Tile::step(Tile::offset(row, col), rows, cols) !=
                     Tile::offset(row + rows, col + cols);
          }
        }
      }
    }
  }
  report("SmemTile::step " + shape_name(kRows, kCols), wrong, steps);
}

template <int kThreads, typename Tile, typename Element>
__global__ void copy_kernel(device::GlobalTile<Element> source, Element* g_tile,
                            device::GlobalTile<Element> destination) {
  auto& s_tile = device::shared_memory<Tile>();
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * Tile::kCols; i += kThreads) {
    s_tile.elements[i] = static_cast<Element>(kUntouched);
  }
  __syncthreads();
  s_tile.template load_async<kThreads>(source);
  ptx::cp_async_wait_all();
  __syncthreads();
  dump_tile(s_tile, g_tile);
  __syncthreads();
  s_tile.template negate<kThreads>();
  __syncthreads();
  s_tile.template store<kThreads>(destination);
}

// Of the tile, `rows` and `cols` exist in memory, in NaN surroundings.
template <typename Element, int kRows, int kCols, int kThreads>
void test_copies(int rows, int cols) {
  using Tile = device::SmemTile<Element, kRows, kCols>;
  const int stride = kCols + 8;
  Managed<Element> source(kRows * stride);
  Managed<Element> tile(kRows * kCols);
  Managed<Element> destination(kRows * stride, static_cast<Element>(kUntouched));
  fill(source, 1);
  const auto exists = [&](int row, int col) { return row < rows && col < cols; };
  for (int i = 0; i < kRows * stride; ++i) {
    if (!exists(i / stride, i % stride)) {
      source[i] = static_cast<Element>(NAN);
    }
  }
  run<copy_kernel<kThreads, Tile, Element>>(
      1, kThreads, sizeof(Tile), device::GlobalTile<Element>{source.data, stride, rows, cols},
      tile.data, device::GlobalTile<Element>{destination.data, stride, rows, cols});
  const std::string shape = shape_name(rows, cols) + " of " + shape_name(kRows, kCols) + ", " +
                            std::to_string(kThreads) + " threads";
  expect(
      "SmemTile::load_async " + shape, kRows, kCols, 0,
      [&](int r, int c) { return static_cast<float>(tile[r * kCols + c]); },
      [&](int r, int c) { return exists(r, c) ? static_cast<float>(source[r * stride + c]) : 0; });
  expect(
      "SmemTile::negate, store " + shape, kRows, stride, 0,
      [&](int r, int c) { return static_cast<float>(destination[r * stride + c]); },
      [&](int r, int c) {
        return exists(r, c) ? -static_cast<float>(source[r * stride + c]) : kUntouched;
      });
}

struct Area {
  int row, col;    // that the pointer is made for
  int rows, cols;  // from there to what is loaded
};

template <typename Tile, bool kDownFirst>
__global__ void lane_kernel(const __half* g_matrix, Area at, uint32_t* g_plain,
                            uint32_t* g_transposed) {
  auto& s_tile = device::shared_memory<Tile>();
  fill_tile(s_tile, g_matrix);
  __syncthreads();
  using Pointer = device::LanePointer<Tile>;
  const auto pointer = kDownFirst ? Pointer::down_first(s_tile, at.row, at.col)
                                  : Pointer::right_first(s_tile, at.row, at.col);
  uint32_t r_plain[4];
  uint32_t r_transposed[4];
  pointer.load(r_plain, at.rows, at.cols);
  pointer.load_transposed(r_transposed, at.rows, at.cols);
  for (int i = 0; i < 4; ++i) {
    g_plain[ptx::lane_index() * 4 + i] = r_plain[i];
    g_transposed[ptx::lane_index() * 4 + i] = r_transposed[i];
  }
}

template <int kRows, int kCols, bool kDownFirst>
void test_lanes(Area at) {
  using Tile = device::SmemTile<__half, kRows, kCols>;
  Managed<__half> matrix(kRows * kCols);
  for (int i = 0; i < kRows * kCols; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    std::memcpy(static_cast<void*>(&matrix[i]), &bits, sizeof(bits));
  }
  Managed<uint32_t> plain(32 * 4);
  Managed<uint32_t> transposed(32 * 4);
  run<lane_kernel<Tile, kDownFirst>>(1, 32, sizeof(Tile), matrix.data, at, plain.data,
                                     transposed.data);
  // Lane and 16-bit half of one of its four registers -> the matrix element that it should be.
  const auto element = [&](int lane, int i, bool is_transposed) {
    const int block = i / 2;
    const int down = kDownFirst ? block % 2 : block / 2;
    const int right = kDownFirst ? block / 2 : block % 2;
    const int outer = lane / 4;
    const int inner = 2 * (lane % 4) + i % 2;
    const int row = at.row + at.rows + 8 * down + (is_transposed ? inner : outer);
    const int col = at.col + at.cols + 8 * right + (is_transposed ? outer : inner);
    return static_cast<double>(row * kCols + col);
  };
  const auto half_of = [](Managed<uint32_t>& registers, int lane, int i) {
    return static_cast<double>(registers[lane * 4 + i / 2] >> (16 * (i % 2)) & 0xffff);
  };
  const std::string name = std::string(kDownFirst ? "down_first " : "right_first ") +
                           shape_name(kRows, kCols) + " at " +
                           shape_name(at.row + at.rows, at.col + at.cols);
  expect(
      "LanePointer, load " + name, 32, 8, 0,
      [&](int lane, int i) { return half_of(plain, lane, i); },
      [&](int lane, int i) { return element(lane, i, false); });
  expect(
      "LanePointer, load_transposed " + name, 32, 8, 0,
      [&](int lane, int i) { return half_of(transposed, lane, i); },
      [&](int lane, int i) { return element(lane, i, true); });
}

template <int kRows, int kCols>
void test_lanes_of(std::initializer_list<Area> areas) {
  for (const Area& at : areas) {
    test_lanes<kRows, kCols, true>(at);
    test_lanes<kRows, kCols, false>(at);
  }
}

}  // namespace fa::test
