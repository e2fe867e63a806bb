// SPDX-License-Identifier: BSD-3-Clause
// From shared tiles of 32-bit elements to fragments of their transpose, which ldmatrix does not
// give: it transposes pairs of bytes.
#pragma once

#include <type_traits>

#include "device/lane_pointer.cuh"

namespace fa::device {

// Where a lane points in a tile to read four 4x8 blocks of an 8x16 area, an element of each, in the
// transpose's order: lane i has column i / 4 and the row that is i % 4 in order. Areas lie as those
// of LanePointer. The blocks that follow one another down hold, for kNextRow = 4, the upper and the
// lower four rows; for kNextRow = 1 the even and the odd ones, as lanes hold the columns of an
// accumulator. Either way a load reads all banks once: see SmemTile::swizzle().
template <typename Tile, int kNextRow>
class WordPointer {
 public:
  static FA_DEVICE WordPointer down_first(const Tile& s_tile, int row, int col) {
    return {s_tile, row, col, true};
  }
  static FA_DEVICE WordPointer right_first(const Tile& s_tile, int row, int col) {
    return {s_tile, row, col, false};
  }

  FA_DEVICE void load_transposed(uint32_t (&r_blocks)[4], int rows, int cols) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int down = down_first_ ? i % 2 : i / 2;
      const int right = down_first_ ? i / 2 : i % 2;
      r_blocks[i] = ptx::load_shared(at(rows + down * kNextRow, cols + right * kBlockCols));
    }
  }

 private:
  static_assert(sizeof(*Tile::elements) == sizeof(uint32_t));
  static_assert(kNextRow == 4 || kNextRow == 1);
  static constexpr int kBytes = sizeof(uint32_t);
  static constexpr int kBlockCols = 8;

  FA_DEVICE WordPointer(const Tile& s_tile, int row, int col, bool down_first)
      : address_(ptx::smem_address(s_tile.elements) + kBytes * Tile::step(lane_offset(), row, col)),
        down_first_(down_first) {}

  static FA_DEVICE int lane_offset() {
    const int lane = lane_to_load<Tile>();
    return Tile::offset(lane % 4 * (kNextRow == 1 ? 2 : 1), lane / 4);
  }

  // As SmemTile::step(), but rows may also differ in bits that those of the lane lack.
  FA_DEVICE uint32_t at(int rows, int cols) const {
    const int in_line = cols % Tile::kPanelCols ^ Tile::swizzle(rows) * Tile::kUnitElements;
    return (address_ ^ (kBytes * in_line)) +
           kBytes * (cols / Tile::kPanelCols * Tile::kRows + rows) * Tile::kPanelCols;
  }

  uint32_t address_;
  bool down_first_;
};

// What reads transposed operands, with the rows of a tile in their order, or in that of the columns
// of an operand made by to_operand().
template <typename Tile>
using TransposingPointer = std::conditional_t<sizeof(*Tile::elements) == sizeof(uint32_t),
                                              WordPointer<Tile, 4>, LanePointer<Tile>>;
template <typename Tile>
using OperandOrderPointer = std::conditional_t<sizeof(*Tile::elements) == sizeof(uint32_t),
                                               WordPointer<Tile, 1>, LanePointer<Tile>>;

}  // namespace fa::device
