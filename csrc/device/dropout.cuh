// SPDX-License-Identifier: BSD-3-Clause
// common/philox.h for a warp's tile of probabilities (queries, keys), the first of (first_query,
// first_key), multiples of 16.
#pragma once

#include "common/philox.h"
#include "device/fragment.cuh"

namespace fa::device {

// Calls visit(keeps, row_of_thread, col_block, i) for each of a thread's probabilities. Of 16 rows
// by 16 columns it has half a patch.
template <typename Tile, typename Visit>
FA_DEVICE void each_decision(const DropoutOfHead& dropout, int first_query, int first_key,
                             Visit&& visit) {
  static_assert(Tile::kColBlocks % 2 == 0 && Tile::kSliceStride % (2 * kBlockCols) == 0);
  // Two numbers of neighbouring keys, from their lower and their upper bytes.
  const uint32_t order = threadIdx.x / 4 % 2 == 0 ? 0x5140 : 0x7362;
#pragma unroll
  for (int a = 0; a < Tile::kRowBlocks; ++a) {
    const int query = first_query + Tile::row(2 * a);
#pragma unroll
    for (int first = 0; first < Tile::kColBlocks; first += 2) {
      // What all patches have alike is found again, rather than kept in registers.
      const int key = static_cast<int>(ptx::opaque(first_key)) + Tile::col(first, 0);
      const DropoutPatch patch = dropout.patch<ptx::MultiplyWide>(query, key);
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const uint32_t numbers = __byte_perm(patch.lower(word), patch.words[word], order);
        visit(dropout.keeps(numbers & 0xFFFF), 2 * a + word % 2, first + word / 2, 0);
        visit(dropout.keeps(numbers >> 16), 2 * a + word % 2, first + word / 2, 1);
      }
    }
  }
}

// What is dropped becomes 0; what is kept is still to be scaled.
template <typename Tile>
FA_DEVICE void drop(Tile& r_p, const DropoutOfHead& dropout, int first_query, int first_key) {
  each_decision<Tile>(dropout, first_query, first_key, [&](bool keeps, int row, int block, int i) {
    float& p = r_p.r[row / 2][block][2 * (row % 2) + i];
    p = keeps ? p : 0.0f;
  });
}

// Which of a thread's probabilities are kept, a bit for each, for what is dropped more than once.
template <typename Tile>
class Kept {
 public:
  FA_DEVICE void find(const DropoutOfHead& dropout, int first_query, int first_key) {
    bits_ = 0;
    each_decision<Tile>(dropout, first_query, first_key,
                        [&](bool keeps, int row, int block, int i) {
                          bits_ |= static_cast<uint32_t>(keeps) << bit(row, block, i);
                        });
  }

  FA_DEVICE void drop(Tile& r_tile) const {
    r_tile.transform([&](float value, int row, int block, int i) {
      return bits_ >> bit(row, block, i) & 1 ? value : 0.0f;
    });
  }

 private:
  static_assert(Tile::kRowsPerThread * Tile::kColBlocks * 2 <= 32);
  static FA_HOST_DEVICE constexpr int bit(int row, int block, int i) {
    return (row * Tile::kColBlocks + block) * 2 + i % 2;
  }

  uint32_t bits_;
};

}  // namespace fa::device
