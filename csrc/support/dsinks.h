// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "common/params.h"

namespace fa::support {

// Of every CUDA backward pass, once its workspace has lse and delta: the gradient of sinks, where
// it is asked for.
void launch_dsinks(const BwdParams& params, void* stream);

}  // namespace fa::support
