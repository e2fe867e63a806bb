// SPDX-License-Identifier: BSD-3-Clause
#include "sm90/launch.cuh"

namespace fa::sm90 {

static const Registration<Pass::kBackward, 192> g_registration;

}  // namespace fa::sm90
