// SPDX-License-Identifier: BSD-3-Clause
// What dropout keeps, written out.
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace fa {

// Where the decisions themselves are written, for tests and for people: (batch, num_heads,
// seqlen_q, seqlen_k) bytes, contiguous, 1 where a probability is kept.
struct DropoutMask {
  Dropout dropout;
  int batch;
  int num_heads;
  int seqlen_q;
  int seqlen_k;
  uint8_t* kept;

  FA_HOST_DEVICE constexpr int64_t rows() const { return int64_t{batch} * num_heads * seqlen_q; }
  // row: below rows(). Writes the keys from `first` on, `step` apart.
  FA_HOST_DEVICE constexpr void fill_row(int64_t row, int first = 0, int step = 1) const {
    const int64_t head = row / seqlen_q;
    const DropoutOfHead of_head(dropout, static_cast<int>(head / num_heads),
                                static_cast<int>(head % num_heads), num_heads);
    for (int key = first; key < seqlen_k; key += step) {
      kept[row * seqlen_k + key] = of_head.keeps(static_cast<int>(row % seqlen_q), key) ? 1 : 0;
    }
  }
};

}  // namespace fa
