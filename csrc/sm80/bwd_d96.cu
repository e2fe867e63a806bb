// SPDX-License-Identifier: BSD-3-Clause
#include "sm80/launch.cuh"

namespace fa::sm80 {

static const Registration<Pass::kBackward, 96> g_registration;

}  // namespace fa::sm80
