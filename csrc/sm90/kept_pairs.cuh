// SPDX-License-Identifier: BSD-3-Clause
// Which pairs dropout keeps (common/philox.h), as bits of a thread that computes. Warps that do not
// compute find them while others multiply, and leave them in shared memory in the order in which
// they are wanted. Where there is no place for them, those who compute find them by themselves.
#pragma once

#include <bit>

#include "common/philox.h"
#include "device/fragment.cuh"

namespace fa::sm90 {

// Whether others leave them to those who compute: there they lie in place of a bias. In backward
// the same warps keep the turns of deterministic runs.
FA_DEVICE bool leaves_kept(const FwdParams& params) {
  return params.rules.terms.dropout.any() && params.rules.bias.data == nullptr;
}
FA_DEVICE bool leaves_kept(const BwdParams& params) {
  return params.rules.terms.dropout.any() && params.rules.bias.data == nullptr &&
         params.workspace.turns == nullptr;
}

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

  FA_DEVICE void store(uint32_t& s_word) const { s_word = bits_; }
  FA_DEVICE void load(const uint32_t& s_word) { bits_ = s_word; }

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

// What is read from shared memory whenever it is wanted, and not kept in registers.
class SharedDropout {
 public:
  FA_DEVICE void store(const DropoutOfHead& dropout) {
    const auto words = std::bit_cast<Words>(dropout);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words_[i] = words.of[i];
    }
  }
  FA_DEVICE DropoutOfHead load() const {
    Words words;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words.of[i] = static_cast<const volatile uint32_t&>(words_[i]);
    }
    return std::bit_cast<DropoutOfHead>(words);
  }

 private:
  static constexpr int kWords = sizeof(DropoutOfHead) / sizeof(uint32_t);
  struct Words {
    uint32_t of[kWords];
  };

  uint32_t words_[kWords];
};

// Of a warp's 16 queries and kKeys keys. The queries begin at a multiple of 16, the keys of 32.
template <int kKeys>
class KeptKeys {
 public:
  static constexpr int kWords = kKeys / 64;  // of a thread
  static constexpr int kWordsOfWarp = kWords * ptx::kWarpSize;

  FA_DEVICE void find(const DropoutOfHead& dropout, int first_query, int first_key) {
#pragma unroll
    for (int slice = 0; slice < kKeys / kSlice; ++slice) {
      push(quads_[slice / 2], dropout, first_query, first_key + slice * kSlice);
    }
  }

  // For another warp. s_words: its own.
  static FA_DEVICE void find_for(const SharedDropout& s_dropout, int first_query, int first_key,
                                 uint32_t* s_words) {
#pragma unroll 1  // few registers
    for (int word = 0; word < kWords; ++word) {
      KeptQuads quads;
#pragma unroll 1
      for (int slice = 2 * word; slice < 2 * (word + 1); ++slice) {
        push(quads, s_dropout.load(), first_query, first_key + slice * kSlice);
      }
      quads.store(s_words[word * ptx::kWarpSize + ptx::lane_index()]);
    }
  }
  FA_DEVICE void load(const uint32_t* s_words) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      quads_[word].load(s_words[word * ptx::kWarpSize + ptx::lane_index()]);
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
    const KeptNeighbours bits(dropout.patch(query, key), dropout.patch(query, key + 1));
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
  static constexpr int kWordsOfWarp = kWords * ptx::kWarpSize;

  FA_DEVICE void find(const DropoutOfHead& dropout, int first_query, int first_key) {
    const bool is_second = first_key / device::kBlockRows % 2 != 0;  // half of a patch's keys
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      KeptQuads quads;
      each_neighbours([&] { return dropout; }, first_query, first_key, word,
                      [&](const KeptNeighbours& bits, uint32_t threshold) {
#pragma unroll
                        for (int block = 0; block < 2; ++block) {
                          quads.push(is_second ? bits.left[2 * block + 1] : bits.left[2 * block],
                                     is_second ? bits.right[2 * block + 1] : bits.right[2 * block],
                                     threshold);
                        }
                      });
      quads_[word] = quads;
    }
  }

  // A word for two warps, which have all keys of the patches: first_key is a multiple of 32.
  // s_words: of the first warp.
  static FA_DEVICE void find_for_two(const SharedDropout& s_dropout, int first_query, int first_key,
                                     int word, uint32_t* s_words) {
    KeptQuads quads[2];
    each_neighbours([&] { return s_dropout.load(); }, first_query, first_key, word,
                    [&](const KeptNeighbours& bits, uint32_t threshold) {
#pragma unroll
                      for (int i = 0; i < 4; ++i) {
                        quads[i % 2].push(bits.left[i], bits.right[i], threshold);
                      }
                    });
#pragma unroll
    for (int warp = 0; warp < 2; ++warp) {
      quads[warp].store(s_words[warp * kWordsOfWarp + word * ptx::kWarpSize + ptx::lane_index()]);
    }
  }
  FA_DEVICE void load(const uint32_t* s_words) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      quads_[word].load(s_words[word * ptx::kWarpSize + ptx::lane_index()]);
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

  // Visits two blocks of 8 queries at a time of the 64 of a word, in order; few calls' registers at
  // a time. dropout_of(): for them.
  template <typename DropoutOf, typename Visit>
  static FA_DEVICE void each_neighbours(DropoutOf&& dropout_of, int first_query, int first_key,
                                        int word, Visit&& visit) {
    const uint32_t lane = ptx::opaque(ptx::lane_index());  // nothing of it is kept
    const int query = first_query + 64 * word + static_cast<int>(lane % 4 * 2);
    const int key = first_key + static_cast<int>(lane / 4);
#pragma unroll 1
    for (int queries = 0; queries < 64; queries += device::kBlockRows) {
      const DropoutOfHead dropout = dropout_of();
      visit(KeptNeighbours(dropout.patch(query + queries, key),
                           dropout.patch(query + queries + 1, key)),
            dropout.threshold());
    }
  }

  KeptQuads quads_[kWords];
};

}  // namespace fa::sm90
