// SPDX-License-Identifier: BSD-3-Clause
// Rows in global memory.
#pragma once

#include "common/params.h"
#include "ptx/common.cuh"

namespace fa::device {

// The rows of one head from some row on. Beyond `rows` and `cols` nothing may be touched.
template <typename Element>
struct GlobalTile {
  Element* g_first;
  int64_t row_stride;
  int rows;
  int cols;

  FA_DEVICE Element* at(int row, int col) const { return g_first + row * row_stride + col; }
};

// The rows of (batch, head) of a sequence, from its row first_row on.
template <typename Element>
FA_DEVICE GlobalTile<Element> global_tile(const TensorView& view, const Sequence& sequence,
                                          int batch, int first_row, int head, int head_dim) {
  return {view.row<Element>(batch, sequence.begin + first_row, head), view.row_stride,
          sequence.length - first_row, head_dim};
}

}  // namespace fa::device
