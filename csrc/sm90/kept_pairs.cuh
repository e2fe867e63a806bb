// SPDX-License-Identifier: BSD-3-Clause
// Which pairs dropout keeps (common/philox.h), as bits of a thread that computes.
#pragma once

#include "common/philox.h"
#include "device/fragment.cuh"

namespace fa::sm90 {

// Bits of eight quads, each of two pairs of neighbours, which an mma operand has in two registers:
// bit 8 * i + q is that of value i of quad q.
class KeptQuads {
 public:
  // Those of the next quad. left, right: words of Philox of two neighbours, with the 16-bit values
  // of both pairs.
  FA_DEVICE void push(uint32_t left, uint32_t right, uint32_t threshold) {
    const uint32_t topmost =
        ptx::permute_bytes<0x7351>(kept_halves(left, threshold), kept_halves(right, threshold));
    bits_ = bits_ >> 1 | (topmost & 0x80808080);
  }

  // All bits of a pair's values, in their halves of a register.
  FA_DEVICE uint32_t mask(int quad, int pair) const {
    const uint32_t topmost = bits_ << (7 - quad);
    return pair == 0 ? ptx::permute_bytes<0x9988>(topmost, topmost)
                     : ptx::permute_bytes<0xBBAA>(topmost, topmost);
  }
  FA_DEVICE bool keeps(int quad, int value) const {
    return (bits_ & 1u << (8 * value + quad)) != 0;
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

// Philox of two neighbours, word by word.
struct KeptNeighbours {
  uint32_t left[4];
  uint32_t right[4];

  FA_DEVICE KeptNeighbours(const DropoutPatch& of_left, const DropoutPatch& of_right)
      : left{of_left.bits.x, of_left.bits.y, of_left.bits.z, of_left.bits.w},
        right{of_right.bits.x, of_right.bits.y, of_right.bits.z, of_right.bits.w} {}
};

// Of a warp's 16 queries and kKeys keys. The queries begin at a multiple of 16, the keys of 32.
template <int kKeys>
class KeptKeys {
 public:
  static constexpr int kWords = kKeys / 64;  // of a thread

  FA_DEVICE void find(const DropoutOfHead& dropout, int first_query, int first_key) {
#pragma unroll
    for (int slice = 0; slice < kKeys / kSlice; ++slice) {
      push(quads_[slice / 2], dropout, first_query, first_key + slice * kSlice);
    }
  }

  // What is dropped becomes 0; the first also scales what is kept.
  FA_DEVICE void keep(device::Accumulator<device::kBlockRows, kKeys>& r_values, float scale) const {
    r_values.transform([&](float value, int row, int block, int i) {
      const int quad = block / 4 % 2 * 4 + 2 * row + block % 4 / 2;
      return quads_[block / 8].keeps(quad, block % 2 * 2 + i % 2) ? value * scale : 0.0f;
    });
  }
  template <typename Element>
  FA_DEVICE void drop(device::OperandA<Element, device::kBlockRows, kKeys>& r_p) const {
#pragma unroll
    for (int slice = 0; slice < kKeys / kSlice; ++slice) {
#pragma unroll
      for (int word = 0; word < 4; ++word) {  // of one row and two blocks of columns
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          r_p.r[0][2 * slice + word % 2][2 * block + word / 2] &=
              quads_[slice / 2].mask(slice % 2 * 4 + word, block);
        }
      }
    }
  }

 private:
  static constexpr int kSlice = 32;  // of keys: that of a patch
  static_assert(kKeys % 64 == 0);

  static FA_DEVICE void push(KeptQuads& quads, const DropoutOfHead& dropout, int first_query,
                             int first_key) {
    const int query = first_query + ptx::lane_index() / 4;
    const int key = first_key + ptx::lane_index() % 4 * 2;
    const KeptNeighbours bits(dropout.patch<ptx::MultiplyWide>(query, key),
                              dropout.patch<ptx::MultiplyWide>(query, key + 1));
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      quads.push(bits.left[word], bits.right[word], dropout.threshold());
    }
  }

  KeptQuads quads_[kWords];
};

// Of a warp's 16 keys and some queries, transposed scores. Both begin at multiples of 16.
template <typename Scores>
class KeptQueries {
 public:
  static constexpr int kWords = Scores::kCols / 64;  // of a thread

  FA_DEVICE void find(const DropoutOfHead& dropout, int first_query, int first_key) {
    const bool is_second = first_key / device::kBlockRows % 2 != 0;  // half of a patch's keys
    const int query = first_query + ptx::lane_index() % 4 * 2;
    const int key = first_key + ptx::lane_index() / 4;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      KeptQuads quads;
#pragma unroll 2
      for (int queries = 64 * word; queries < 64 * (word + 1); queries += device::kBlockRows) {
        const KeptNeighbours bits(dropout.patch<ptx::MultiplyWide>(query + queries, key),
                                  dropout.patch<ptx::MultiplyWide>(query + queries + 1, key));
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          quads.push(is_second ? bits.left[i + 1] : bits.left[i],
                     is_second ? bits.right[i + 1] : bits.right[i], dropout.threshold());
        }
      }
      quads_[word] = quads;
    }
  }

  // What is dropped becomes 0; the first also scales what is kept.
  FA_DEVICE void keep(Scores& r_values, float scale) const {
    r_values.transform([&](float value, int row, int block, int i) {
      return quads_[block / 8].keeps(block % 8, 2 * row + i % 2) ? value * scale : 0.0f;
    });
  }
  template <typename Element>
  FA_DEVICE void drop(device::OperandA<Element, device::kBlockRows, Scores::kCols>& r_p) const {
#pragma unroll
    for (int block = 0; block < Scores::kColBlocks; ++block) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        r_p.r[0][block / 2][block % 2 * 2 + row] &= quads_[block / 8].mask(block % 8, row);
      }
    }
  }

 private:
  static_assert(Scores::kRowBlocks == 1 && Scores::kCols % 64 == 0);

  KeptQuads quads_[kWords];
};

}  // namespace fa::sm90
