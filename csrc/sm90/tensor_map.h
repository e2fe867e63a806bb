// SPDX-License-Identifier: BSD-3-Clause
// Tensor maps: how TMA sees a tensor.
#pragma once

#include <cuda.h>

#include "common/params.h"

namespace fa::sm90 {

// A tensor as TMA sees it: (batch, head, row, column), in boxes of box_rows rows of 64 columns of
// one head. Rows and columns past the ends are read as zero and never written.
struct TensorMapRequest {
  TensorView view;
  Dtype dtype;
  int batch;
  int heads;
  int rows;
  int cols;
  int box_rows;
};

CUtensorMap make_tensor_map(const TensorMapRequest& request);

}  // namespace fa::sm90
