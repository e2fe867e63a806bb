// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "common/params.h"

namespace fa::support {

// The first step of every CUDA backward pass: fills the workspace with lse in octaves and
// delta = rowsum(dout * out) - dlse, and with zeros where blocks will add.
// Element: __nv_bfloat16, __half or float. Rows of out and dout must be whole loads of 16 bytes.
template <typename Element>
void launch_bwd_preprocess(const BwdParams& params, void* stream);

}  // namespace fa::support
