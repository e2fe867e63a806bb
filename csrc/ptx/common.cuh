// SPDX-License-Identifier: BSD-3-Clause
// The place of a thread, addresses, and single arithmetic instructions.
#pragma once

#include <cstdint>

#include "common/types.h"

#define FA_DEVICE __device__ __forceinline__

namespace fa::ptx {

inline constexpr int kWarpSize = 32;

FA_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }
// x, which is the same in all lanes: the compiler learns that and may keep it in a uniform
// register.
FA_DEVICE int uniform(int x) { return __shfl_sync(~0u, x, 0); }

FA_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// The 32-bit address that shared memory instructions take.
FA_DEVICE uint32_t smem_address(const void* s_pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(s_pointer));
}

// 32 bits of shared memory.
// PTX ISA, "Data Movement and Conversion Instructions: ld", .shared.
FA_DEVICE uint32_t load_shared(uint32_t s_word) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(s_word) : "memory");
  return word;
}

// x, about which the compiler knows nothing. What is computed from it inside a loop is not computed
// ahead of the loop, where it would occupy registers.
// PTX ISA, "Data Movement and Conversion Instructions: mov".
FA_DEVICE uint32_t opaque(uint32_t x) {
  uint32_t result;
  asm volatile("mov.u32 %0, %1;" : "=r"(result) : "r"(x));
  return result;
}

// Byte i of the result is what the i-th four bits of `selector` name: one of x's bytes, 0 to 3, or
// of y's, 4 to 7; and 8 more is eight times its topmost bit, which __byte_perm cannot.
// PTX ISA, "Data Movement and Conversion Instructions: prmt".
template <uint32_t kSelector>
FA_DEVICE uint32_t permute_bytes(uint32_t x, uint32_t y) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "n"(kSelector));
  return result;
}

// x * y with all of its 64 bits.
// PTX ISA, "Integer Arithmetic Instructions: mul".
struct MultiplyWide {
  FA_DEVICE uint64_t operator()(uint32_t x, uint32_t y) const {
    uint64_t product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(x), "r"(y));
    return product;
  }
};

// How many blocks the launch has, read here and not ahead of a loop.
// PTX ISA, "Special Registers: %nctaid".
FA_DEVICE uint32_t grid_size() {
  uint32_t blocks;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(blocks));
  return blocks;
}

// 2^x to two units in the last place; exactly 0 for -inf, and subnormal results are 0.
// PTX ISA, "Floating Point Instructions: ex2".
FA_DEVICE float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x to one unit in the last place; 0 for infinities.
// PTX ISA, "Floating Point Instructions: rcp.approx".
FA_DEVICE float reciprocal_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace fa::ptx
