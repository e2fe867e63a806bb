// SPDX-License-Identifier: BSD-3-Clause
// Which pairs dropout keeps (common/philox.h), as bits of a thread that computes.
#pragma once

#include "common/philox.h"
#include "device/fragment.cuh"

namespace fa::sm90 {

// Bits of 16 registers of mma operands, each of two neighbouring values: bit 8 * i + q is that of
// value i of the pair of registers q.
class KeptOfRegisters {
 public:
  // The bits of the next two registers. first, second: words of a patch, a 16-bit number for each
  // value.
  FA_DEVICE void push(uint32_t first, uint32_t second, uint32_t threshold) {
    const uint32_t topmost =
        ptx::permute_bytes<0x7531>(kept_halves(first, threshold), kept_halves(second, threshold));
    bits_ = bits_ >> 1 | (topmost & 0x80808080);
  }

  // Of transposed operands, whose values are neighbours in other registers. Lanes of even and odd
  // rows have found the bits of the first and of the second value of their registers, for each
  // other's rows, too.
  FA_DEVICE void exchange_rows() {
    const uint32_t others = __shfl_xor_sync(~0u, bits_, 4);
    const bool is_odd = ptx::lane_index() / 4 % 2 != 0;
    bits_ = is_odd ? ptx::permute_bytes<0x3715>(bits_, others)
                   : ptx::permute_bytes<0x6240>(bits_, others);
  }

  // All bits of a register's values, in their halves.
  FA_DEVICE uint32_t mask(int pair, int which) const {
    const uint32_t topmost = bits_ << (7 - pair);
    return which == 0 ? ptx::permute_bytes<0x9988>(topmost, topmost)
                      : ptx::permute_bytes<0xBBAA>(topmost, topmost);
  }
  FA_DEVICE bool keeps(int pair, int value) const {
    return (bits_ & 1u << (8 * value + pair)) != 0;
  }

 private:
  // Of each half of a word its topmost bit: whether the half is kept. Two are compared at a time.
  static FA_DEVICE uint32_t kept_halves(uint32_t values, uint32_t threshold) {
    // The carry of threshold + ~value, of 17 bits, of which half is kept.
    const uint32_t thresholds = threshold * 0x10001;
    return (~values & thresholds) + (((~values ^ thresholds) & 0xFFFEFFFE) >> 1);
  }

  uint32_t bits_ = 0;
};

// Of a warp's 16 queries and kCols keys, or, transposed, of 16 keys and kCols queries. All begin at
// multiples of 16.
template <int kCols, bool kTransposed>
class KeptPairs {
 public:
  FA_DEVICE void find(const DropoutOfHead& dropout, int first_query, int first_key) {
    // Where registers are fewest, those of the lane are not kept.
    const int lane = kTransposed ? static_cast<int>(ptx::opaque(threadIdx.x) % ptx::kWarpSize)
                                 : ptx::lane_index();
    const int row = lane / 4;
    const int col = lane % 4 * 2;
    // Transposed, a lane has keys of its own and of its neighbour's row, of one query.
    const int query = first_query + (kTransposed ? col + row % 2 : row);
    const int key = first_key + (kTransposed ? row / 2 * 2 : col);
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      KeptOfRegisters bits;
#pragma unroll 2
      for (int cols = kColsOfWord * word; cols < kColsOfWord * (word + 1);
           cols += device::kBlockRows) {
        const PhiloxCounter patch = dropout
                                        .patch<ptx::MultiplyWide>(query + (kTransposed ? cols : 0),
                                                                  key + (kTransposed ? 0 : cols))
                                        .bits;
        bits.push(patch.x, kTransposed ? patch.z : patch.y, dropout.threshold());
        bits.push(kTransposed ? patch.y : patch.z, patch.w, dropout.threshold());
      }
      if (kTransposed) {
        bits.exchange_rows();
      }
      words_[word] = bits;
    }
  }

  // As a tile's transform() names its values.
  FA_DEVICE bool keeps(int row, int block, int i) const {
    return words_[block / 8].keeps(block % 8, 2 * row + i % 2);
  }

  // What is dropped becomes 0; the first also scales what is kept.
  FA_DEVICE void keep(device::Accumulator<device::kBlockRows, kCols>& r_values, float scale) const {
    r_values.transform([&](float value, int row, int block, int i) {
      return keeps(row, block, i) ? value * scale : 0.0f;
    });
  }
  template <typename Element>
  FA_DEVICE void drop(device::OperandA<Element, device::kBlockRows, kCols>& r_p) const {
#pragma unroll
    for (int block = 0; block < kCols / device::kBlockCols; ++block) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        r_p.r[0][block / 2][block % 2 * 2 + row] &= words_[block / 8].mask(block % 8, row);
      }
    }
  }

 private:
  static constexpr int kColsOfWord = 64;
  static constexpr int kWords = kCols / kColsOfWord;
  static_assert(kCols % kColsOfWord == 0);

  KeptOfRegisters words_[kWords];
};

}  // namespace fa::sm90
