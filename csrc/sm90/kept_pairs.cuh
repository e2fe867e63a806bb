// SPDX-License-Identifier: BSD-3-Clause
// Which pairs dropout keeps (common/philox.h), as bits of a thread that computes.
#pragma once

#include "common/philox.h"
#include "device/fragment.cuh"

namespace fa::sm90 {

// Bits of up to 16 registers of mma operands, each of two neighbouring values: bit 8 * i + q is
// that of value i of the pair of registers q.
class KeptOfRegisters {
 public:
  // The bits of the next two registers. first, second: a number for each value.
  FA_DEVICE void push(uint32_t first, uint32_t second, uint32_t threshold) {
    const uint32_t topmost =
        ptx::permute_bytes<0x7531>(kept_halves(first, threshold), kept_halves(second, threshold));
    bits_ = bits_ >> 1 | (topmost & 0x80808080);
  }

  // Those of a lane's own columns and of its neighbour's, four pairs each, become those of eight.
  FA_DEVICE KeptOfRegisters followed_by(KeptOfRegisters last) const {
    last.bits_ |= bits_ >> 4;
    return last;
  }

  FA_DEVICE KeptOfRegisters of_lane_across(int distance) const {
    KeptOfRegisters others;
    others.bits_ = __shfl_xor_sync(~0u, bits_, distance);
    return others;
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
  // Of two blocks of 16 columns the lanes of even rows find what is kept in the first, those of odd
  // rows in the second, for both.
  FA_DEVICE void find(const DropoutOfHead& dropout, int first_query, int first_key) {
    // Where registers are fewest, those of the lane are not kept.
    const int lane = kTransposed ? static_cast<int>(ptx::opaque(threadIdx.x) % ptx::kWarpSize)
                                 : ptx::lane_index();
    const int row = lane / 4;
    const int col = lane % 4 * 2 + row % 2 * device::kBlockRows;
    const int query = first_query + (kTransposed ? col : row);
    const int key = first_key + (kTransposed ? row : col);
    KeptOfRegisters even;
    KeptOfRegisters odd;
#pragma unroll 2
    for (int cols = 0; cols < kCols; cols += 2 * device::kBlockRows) {
      const DropoutPatch patch = dropout.patch<ptx::MultiplyWide>(query + (kTransposed ? cols : 0),
                                                                  key + (kTransposed ? 0 : cols));
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        const int first = kTransposed ? block : 2 * block;  // words of the two registers
        const int second = kTransposed ? block + 2 : 2 * block + 1;
        even.push(numbers<false>(patch, first), numbers<false>(patch, second), dropout.threshold());
        odd.push(numbers<true>(patch, first), numbers<true>(patch, second), dropout.threshold());
      }
    }
    const bool is_odd = row % 2 != 0;
    const KeptOfRegisters others = (is_odd ? even : odd).of_lane_across(4);
    const KeptOfRegisters first = is_odd ? others : even;
    const KeptOfRegisters second = is_odd ? odd : others;
    words_[0] = kWords == 1 ? first.followed_by(second) : first;
    if constexpr (kWords > 1) {
      words_[1] = second;
    }
  }

  // As a tile's transform() names its values.
  FA_DEVICE bool keeps(int row, int block, int i) const {
    return words_[place(block) / 8].keeps(place(block) % 8, 2 * row + i % 2);
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
        r_p.r[0][block / 2][block % 2 * 2 + row] &=
            words_[place(block) / 8].mask(place(block) % 8, row);
      }
    }
  }

 private:
  static constexpr int kWords = kCols / 64;
  static_assert(kCols == 64 || kCols == 128);

  // Of 8 columns, among the pairs of registers: those of every first 16 columns come before those
  // of every second.
  static FA_HOST_DEVICE constexpr int place(int block) {
    return block / 2 % 2 * (kCols / device::kBlockRows) + block / 4 * 2 + block % 2;
  }

  // Of a word of a patch, those of an even or an odd row of the tile.
  template <bool kOdd>
  static FA_DEVICE uint32_t numbers(const DropoutPatch& patch, int word) {
    constexpr uint32_t kOrder = kTransposed ? (kOdd ? 0x7351 : 0x6240) : (kOdd ? 0x7362 : 0x5140);
    return ptx::permute_bytes<kOrder>(patch.lower(word), patch.words[word]);
  }

  KeptOfRegisters words_[kWords];
};

}  // namespace fa::sm90
