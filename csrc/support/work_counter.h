// SPDX-License-Identifier: BSD-3-Clause
// Where the blocks of one launch count the work that they have taken.
#pragma once

#include "common/scheduler.h"

namespace fa::support {

// For the next launch on a stream of the current device: a counter in its memory that is zero when
// the kernel begins, and that no other launch uses which may run at the same time. The kernel must
// leave it zero. Two executable graphs of one capture share its counters, as they share its
// tensors, and must not run at the same time. May be called by several threads at once, and while
// the stream is captured.
WorkCounter* work_counter(void* stream);

}  // namespace fa::support
