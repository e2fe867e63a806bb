// SPDX-License-Identifier: BSD-3-Clause
// Additions to global memory that return nothing. A block is four floats of each lane of a warp,
// 128 floats in the order that the device adds fastest: lane by lane where one instruction takes
// four floats (compute capability 9.0), else float by float, so that each instruction of a warp
// touches one line. g_lane is where lane_of_block() puts this lane.
#pragma once

#include "ptx/common.cuh"

namespace fa::ptx {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

template <typename Float>
FA_DEVICE Float* lane_of_block(Float* g_block) {
  return g_block + 4 * lane_index();
}

// PTX ISA, "Parallel Synchronization and Communication Instructions: red", .v4.f32.
FA_DEVICE void reduce_add_block(float* g_lane, const float (&r_values)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(g_lane), "f"(r_values[0]),
               "f"(r_values[1]), "f"(r_values[2]), "f"(r_values[3])
               : "memory");
}

FA_DEVICE void load_block(const float* g_lane, float (&r_values)[4]) {
  const float4 values = *reinterpret_cast<const float4*>(g_lane);
  r_values[0] = values.x;
  r_values[1] = values.y;
  r_values[2] = values.z;
  r_values[3] = values.w;
}

#else

template <typename Float>
FA_DEVICE Float* lane_of_block(Float* g_block) {
  return g_block + lane_index();
}

// PTX ISA, "Parallel Synchronization and Communication Instructions: red", .f32.
FA_DEVICE void reduce_add_block(float* g_lane, const float (&r_values)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(g_lane + kWarpSize * i), "f"(r_values[i])
                 : "memory");
  }
}

FA_DEVICE void load_block(const float* g_lane, float (&r_values)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    r_values[i] = g_lane[kWarpSize * i];
  }
}

#endif

// PTX ISA, "Data Movement and Conversion Instructions: ld", .acquire.gpu.
FA_DEVICE int load_acquire(const int* g_value) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(g_value) : "memory");
  return value;
}

// PTX ISA, "Parallel Synchronization and Communication Instructions: red", .release.gpu.
FA_DEVICE void add_release(int* g_value, int addend) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(g_value), "r"(addend) : "memory");
}

}  // namespace fa::ptx
