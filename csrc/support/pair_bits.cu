// SPDX-License-Identifier: BSD-3-Clause
// A warp packs 32 rows of a tile: a vote of its lanes, which have 32 columns each, makes a word of
// a row, which is kept by the lane of the row's number.
#include "support/pair_bits.h"

#include <cstdint>
#include <type_traits>

#include "common/check.h"
#include "ptx/common.cuh"
#include "support/launch.cuh"

namespace fa::support {
namespace {

constexpr int kMostThreads = 128;  // of a block, which has a tile
constexpr int kBlocks = 5;         // of a multiprocessor
constexpr int kRows = ptx::kWarpSize;
constexpr int kBitsOfByte = 8;

// The bytes of the pairs of a warp's rows.
struct MaskPart {
  const uint8_t* g_first;
  int rows;  // that exist, of these and of those behind them
  int cols;
  int64_t row_stride;
  int64_t col_stride;

  FA_DEVICE uint32_t at(int row, int col) const {
    return row < rows && col < cols ? __ldg(g_first + row * row_stride + col * col_stride) : 0;
  }
  // Whether all lines that lie `stride` apart begin at multiples of so many bytes.
  FA_DEVICE bool is_aligned(int64_t stride, int bytes) const {
    return reinterpret_cast<uintptr_t>(g_first) % bytes == 0 && stride % bytes == 0;
  }
};

template <int kWords>
class RowBits {
 public:
  FA_DEVICE void pack(const MaskPart& part) {
    if (part.row_stride == 1 && part.rows >= kRows && part.is_aligned(part.col_stride, 16)) {
      pack_lines<uint4>(part);
    } else if (part.row_stride == 1 && part.rows >= kRows && part.is_aligned(part.col_stride, 4)) {
      pack_lines<uint32_t>(part);
    } else if (part.col_stride == 1 && part.cols >= kCols &&
               part.is_aligned(part.row_stride, kWords)) {
      pack_rows<16>([&](int row) -> uint32_t {
        const uint8_t* g_row = part.g_first + row * part.row_stride;
        return row < part.rows
                   ? __ldg(reinterpret_cast<const UnitOfRow*>(g_row) + ptx::lane_index())
                   : 0;
      });
    } else {
      pack_rows<4>([&](int row) {
        uint32_t bytes = 0;
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
          bytes |= part.at(row, col(word)) << (kBitsOfByte * word);
        }
        return bytes;
      });
    }
  }

  // To where the words of the warp's first row are.
  FA_DEVICE void store(uint32_t* g_words) const {
    using Unit = std::conditional_t<kWords == 4, uint4, uint2>;
    static_assert(sizeof(Unit) == sizeof(words_));
    reinterpret_cast<Unit*>(g_words)[ptx::lane_index()] = reinterpret_cast<const Unit&>(words_);
  }

 private:
  static constexpr int kCols = kWords * ptx::kWarpSize;
  static_assert(kWords == 2 || kWords == 4);
  using UnitOfRow = std::conditional_t<kWords == 4, uint32_t, uint16_t>;  // a lane's columns

  // The column whose bit of a word is this lane's.
  static FA_DEVICE int col(int word) { return kWords * ptx::lane_index() + word; }

  // Row after row; load(row) has a byte of each word.
  template <int kAtOnce, typename Load>
  FA_DEVICE void pack_rows(Load&& load) {
#pragma unroll 1
    for (int first = 0; first < kRows; first += kAtOnce) {
      uint32_t bytes[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        bytes[i] = load(first + i);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        vote(first + i, [&](int word) { return (bytes[i] >> (kBitsOfByte * word) & 0xFF) != 0; });
      }
    }
  }

  // Where a column's bytes lie side by side: each lane reads all rows of its columns.
  template <typename Unit>
  FA_DEVICE void pack_lines(const MaskPart& part) {
    constexpr int kUnits = kRows / sizeof(Unit);
    union Line {
      Unit units[kUnits];
      uint32_t quads[kRows / 4];  // of rows
    };
    Line lines[kWords];
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const uint8_t* g_line = part.g_first + col(word) * part.col_stride;
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        lines[word].units[i] =
            col(word) < part.cols ? __ldg(reinterpret_cast<const Unit*>(g_line) + i) : Unit{};
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      vote(row, [&](int word) {
        return (lines[word].quads[row / 4] >> (kBitsOfByte * (row % 4)) & 0xFF) != 0;
      });
    }
  }

  template <typename Keeps>
  FA_DEVICE void vote(int row, Keeps&& keeps) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const uint32_t bits = __ballot_sync(~0u, keeps(word));
      words_[word] = row == ptx::lane_index() ? bits : words_[word];
    }
  }

  alignas(16) uint32_t words_[kWords] = {};
};

// The scheduler's tiles are those of a matrix, in their order.
template <int kWords>
__global__ void __launch_bounds__(kMostThreads, kBlocks)
    flash_pair_bits(const __grid_constant__ PairBitsParams params, const TileScheduler scheduler) {
  const WorkTile item = scheduler.at(scheduler.first + blockIdx.x);
  const int query_tile = item.tile / params.bits.key_tiles;
  const int query = query_tile * params.tile_m;
  const int key_tile = item.tile - query_tile * params.bits.key_tiles;
  const int key = key_tile * params.tile_n;
  const PrefixWindow window(params.window, 0);
  if (!window.any({query, query + params.tile_m}, {key, key + params.tile_n})) {
    return;
  }
  const int first_row = ptx::warp_index() * kRows;
  const KeepMask& mask = params.mask;
  const auto* g_tile = mask.of_head<const uint8_t>(item.batch, item.head) + mask.offset(query, key);
  const int queries = params.shape.seqlen_q - query;
  const int keys = params.shape.seqlen_k - key;
  const bool keys_are_rows = params.rows == BitRows::kKeys;
  const int64_t row_stride = keys_are_rows ? mask.key_stride : mask.query_stride;
  RowBits<kWords> bits;
  bits.pack({g_tile + first_row * row_stride, (keys_are_rows ? keys : queries) - first_row,
             keys_are_rows ? queries : keys, row_stride,
             keys_are_rows ? mask.query_stride : mask.key_stride});
  bits.store(params.bits.tile(item.batch, item.head, query_tile, key_tile) + first_row * kWords);
}

}  // namespace

void launch_pair_bits(const PairBitsParams& params, void* stream) {
  const PairBits& bits = params.bits;
  const TileScheduler scheduler = {bits.query_tiles * bits.key_tiles,
                                   bits.heads(params.shape.num_heads),
                                   bits.batch(params.shape.batch)};
  const bool keys_are_rows = params.rows == BitRows::kKeys;
  const int rows = keys_are_rows ? params.tile_n : params.tile_m;
  const int cols = keys_are_rows ? params.tile_m : params.tile_n;
  check(rows % kRows == 0 && rows <= kMostThreads && (cols == 64 || cols == 128),
        ErrorKind::kRuntime, "pair bits: expected tiles of up to 128 rows and 64 or 128 columns");
  if (cols == 128) {
    launch<flash_pair_bits<4>>("flash_pair_bits", params, scheduler, rows, 0, stream);
  } else {
    launch<flash_pair_bits<2>>("flash_pair_bits", params, scheduler, rows, 0, stream);
  }
}

}  // namespace fa::support
