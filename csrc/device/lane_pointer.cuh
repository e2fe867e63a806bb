// SPDX-License-Identifier: BSD-3-Clause
// Between shared tiles and fragments: the addresses that lanes give to ldmatrix and stmatrix.
#pragma once

#include "device/smem.cuh"
#include "ptx/mma_sm80.cuh"
#include "ptx/stmatrix.cuh"

namespace fa::device {

// The lane, from which addresses are computed. Those of floats are not kept in registers, which
// their factors need.
template <typename Tile>
FA_DEVICE int lane_to_load() {
  if (sizeof(*Tile::elements) == sizeof(float)) {
    return static_cast<int>(ptx::opaque(threadIdx.x) % ptx::kWarpSize);
  }
  return ptx::lane_index();
}

// Where a lane points in a tile for ldmatrix and stmatrix, which move four 8x8 blocks of a 16x16
// area, and what moves at constant steps from there. The area that the pointer is made for starts
// at (row, col): multiples of 8 and 16, and col such that col + cols never carries in binary.
// Of 32-bit elements, each of which moves as a pair of 16-bit ones does, blocks are 8x4.
template <typename Tile>
class LanePointer {
 public:
  // The four blocks follow one another first down, then right,
  static FA_DEVICE LanePointer down_first(const Tile& s_tile, int row, int col) {
    const int lane = lane_to_load<Tile>();
    return {s_tile, Tile::offset(lane % 16, lane / 16 * Tile::kUnitElements), row, col};
  }

  // or first right, then down.
  static FA_DEVICE LanePointer right_first(const Tile& s_tile, int row, int col) {
    const int lane = lane_to_load<Tile>();
    return {s_tile, Tile::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2 * Tile::kUnitElements), row,
            col};
  }

  FA_DEVICE void load(uint32_t (&r_blocks)[4], int rows, int cols) const {
    ptx::ldmatrix_x4(r_blocks, at(rows, cols));
  }
  FA_DEVICE void load_transposed(uint32_t (&r_blocks)[4], int rows, int cols) const {
    ptx::ldmatrix_x4_trans(r_blocks, at(rows, cols));
  }
  FA_DEVICE void store(const uint32_t (&r_blocks)[4], int rows, int cols) const {
    ptx::stmatrix_x4(at(rows, cols), r_blocks);
  }
  FA_DEVICE void store_transposed(const uint32_t (&r_blocks)[4], int rows, int cols) const {
    ptx::stmatrix_x4_trans(at(rows, cols), r_blocks);
  }

 private:
  static constexpr int kBytes = sizeof(*Tile::elements);

  FA_DEVICE LanePointer(const Tile& s_tile, int lane_offset, int row, int col)
      : address_(ptx::smem_address(s_tile.elements) + kBytes * Tile::step(lane_offset, row, col)) {}

  // As SmemTile::step(): the tile is aligned, so that the swizzle works on addresses too.
  FA_DEVICE uint32_t at(int rows, int cols) const {
    return (address_ ^ (kBytes * (cols % Tile::kPanelCols))) +
           kBytes * (cols / Tile::kPanelCols * Tile::kRows + rows) * Tile::kPanelCols;
  }

  uint32_t address_;
};

}  // namespace fa::device
