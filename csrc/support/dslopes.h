// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "common/params.h"

namespace fa::support {

// Of every CUDA backward pass, once its workspace has lse and delta: the gradient of ALiBi's
// slopes, where it is asked for. Element: of q, k and v.
template <typename Element>
void launch_dslopes(const BwdParams& params, void* stream);

}  // namespace fa::support
