// SPDX-License-Identifier: BSD-3-Clause
// Statistics of queries beside transposed scores.
#pragma once

#include "ptx/common.cuh"

namespace fa::sm90 {

// What a row of queries has in shared memory, of the columns of transposed scores that this lane
// holds.
template <typename Scores>
struct ColumnValues {
  float2 r[Scores::kColBlocks];

  FA_DEVICE void load(const float* s_values) {
#pragma unroll
    for (int block = 0; block < Scores::kColBlocks; ++block) {
      r[block] = *reinterpret_cast<const float2*>(s_values + Scores::col(block, 0));
    }
  }
  FA_DEVICE float of(int block, int i) const { return i % 2 == 0 ? r[block].x : r[block].y; }
};

}  // namespace fa::sm90
