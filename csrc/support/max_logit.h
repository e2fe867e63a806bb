// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "common/params.h"

namespace fa::support {

// Of every CUDA forward pass: the largest score of each head, where it is asked for. Element: of
// q and k.
template <typename Element>
void launch_max_logit(const FwdParams& params, void* stream);

}  // namespace fa::support
