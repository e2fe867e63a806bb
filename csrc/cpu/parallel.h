// SPDX-License-Identifier: BSD-3-Clause
// Work on the caller's threads. What a task is follows from the shape alone, never from the number
// of threads, so that results are the same bits on any number of them.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "common/window.h"
#include "cpu/simd.h"
#include "dispatch/registry.h"

namespace fa::cpu::FA_CPU_ISA {

// Threads get contiguous chunks of work. Under a causal mask late tiles are long, so the order
// takes tiles in turn from both ends: 0, n-1, 1, n-2, ...
FA_CPU_INLINE int balanced(int index, int tiles) {
  return index % 2 == 0 ? index / 2 : tiles - 1 - index / 2;
}

FA_CPU_INLINE Range tile_range(int index, int tile_size, int seqlen) {
  return {index * tile_size, min((index + 1) * tile_size, seqlen)};
}

// Runs body(begin, end) over chunks of [0, count).
template <typename Body>
void parallel_for(const LaunchContext& context, int64_t count, const Body& body) {
  if (count == 0) {
    return;
  }
  const auto run_chunk = [](int64_t begin, int64_t end, void* argument) {
    (*static_cast<const Body*>(argument))(begin, end);
  };
  context.parallel_for(0, count, 1, run_chunk, const_cast<Body*>(&body));
}

}  // namespace fa::cpu::FA_CPU_ISA
