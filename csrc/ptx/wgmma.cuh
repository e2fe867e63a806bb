// SPDX-License-Identifier: BSD-3-Clause
// Hopper's matrix product of a warpgroup, wgmma: (64, kCols) += (64, 16) (16, kCols), asynchronous,
// with 16-bit operands and float sums. Each of the four warps has 16 rows of the result, in
// registers as Accumulator<16, kCols> describes (device/fragment.cuh).
//
// Between fence and wait no other instruction may touch the registers of a product. Groups of
// products, closed by commit, complete in order.
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx/common.cuh"

namespace fa::ptx {

FA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending groups are under way.
template <int kPending>
FA_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from reading a result ahead of the wait for it.
template <int kBlocks>
FA_DEVICE void wgmma_pin(float (&r)[kBlocks][4]) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    asm volatile(""
                 : "+f"(r[block][0]), "+f"(r[block][1]), "+f"(r[block][2]),
                   "+f"(r[block][3])::"memory");
  }
}

// Makes a warpgroup's threads have so many registers: given back to the block, or taken from it
// when there are enough.
// PTX ISA, "Miscellaneous Instructions: setmaxnreg".
template <int kRegisters>
FA_DEVICE void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FA_DEVICE void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A product's registers as operands of inline assembly, by blocks of 8 columns, and their names.
#define FA_BLOCK(b) "+f"(r[b][0]), "+f"(r[b][1]), "+f"(r[b][2]), "+f"(r[b][3])
#define FA_BLOCKS_48 FA_BLOCK(0), FA_BLOCK(1), FA_BLOCK(2), FA_BLOCK(3), FA_BLOCK(4), FA_BLOCK(5)
#define FA_NAMES_48                                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23"
#define FA_BLOCKS_64                                                                         \
  FA_BLOCK(0), FA_BLOCK(1), FA_BLOCK(2), FA_BLOCK(3), FA_BLOCK(4), FA_BLOCK(5), FA_BLOCK(6), \
      FA_BLOCK(7)
#define FA_NAMES_64                                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FA_BLOCKS_80 FA_BLOCKS_64, FA_BLOCK(8), FA_BLOCK(9)
#define FA_NAMES_80 FA_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FA_BLOCKS_96 FA_BLOCKS_80, FA_BLOCK(10), FA_BLOCK(11)
#define FA_NAMES_96 FA_NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FA_BLOCKS_112 FA_BLOCKS_96, FA_BLOCK(12), FA_BLOCK(13)
#define FA_NAMES_112 FA_NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FA_BLOCKS_128 FA_BLOCKS_112, FA_BLOCK(14), FA_BLOCK(15)
#define FA_NAMES_128 FA_NAMES_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FA_BLOCKS_192                                                                  \
  FA_BLOCKS_128, FA_BLOCK(16), FA_BLOCK(17), FA_BLOCK(18), FA_BLOCK(19), FA_BLOCK(20), \
      FA_BLOCK(21), FA_BLOCK(22), FA_BLOCK(23)
#define FA_NAMES_192                                                                   \
  FA_NAMES_128                                                                         \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FA_BLOCKS_256                                                                  \
  FA_BLOCKS_192, FA_BLOCK(24), FA_BLOCK(25), FA_BLOCK(26), FA_BLOCK(27), FA_BLOCK(28), \
      FA_BLOCK(29), FA_BLOCK(30), FA_BLOCK(31)
#define FA_NAMES_256                                                                     \
  FA_NAMES_192                                                                           \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "   \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127"

// ss takes a from shared memory: (64, 16), K-major, or else (16, 64), MN-major, which is with its
// columns contiguous; and b likewise, (kCols, 16) or else (16, kCols). rs takes a from registers,
// and b from shared memory, MN-major. Without `accumulate` the result starts from zero.
template <typename Element, int kCols>
struct Wgmma;

#define FA_WGMMA(ELEMENT, TYPE, COLS, I0, I1, I2, I3, I4, I5)                                   \
  template <>                                                                                   \
  struct Wgmma<ELEMENT, COLS> {                                                                 \
    template <bool kBIsMnMajor = false, bool kAIsMnMajor = false>                               \
    static FA_DEVICE void ss(float (&r)[COLS / 8][4], uint64_t a, uint64_t b, int accumulate) { \
      asm volatile(                                                                             \
          "{\n"                                                                                 \
          "  .reg .pred p;\n"                                                                   \
          "  setp.ne.b32 p, " I2                                                                \
          ", 0;\n"                                                                              \
          "  wgmma.mma_async.sync.aligned.m64n" #COLS "k16.f32." TYPE "." TYPE                  \
          " {" FA_NAMES_##COLS "}, " I0 ", " I1 ", p, 1, 1, " I4 ", " I3                        \
                               ";\n"                                                            \
                               "}"                                                              \
          : FA_BLOCKS_##COLS                                                                    \
          : "l"(a), "l"(b), "r"(accumulate), "n"(kBIsMnMajor), "n"(kAIsMnMajor));               \
    }                                                                                           \
    static FA_DEVICE void rs(float (&r)[COLS / 8][4], const uint32_t (&a)[4], uint64_t b,       \
                             int accumulate) {                                                  \
      asm volatile(                                                                             \
          "{\n"                                                                                 \
          "  .reg .pred p;\n"                                                                   \
          "  setp.ne.b32 p, " I5                                                                \
          ", 0;\n"                                                                              \
          "  wgmma.mma_async.sync.aligned.m64n" #COLS "k16.f32." TYPE "." TYPE                  \
          " {" FA_NAMES_##COLS "}, {" I0 ", " I1 ", " I2 ", " I3 "}, " I4                       \
                               ", p, 1, 1, 1;\n"                                                \
                               "}"                                                              \
          : FA_BLOCKS_##COLS                                                                    \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));               \
    }                                                                                           \
  };
#define FA_WGMMA_OF_COLS(COLS, ...)                  \
  FA_WGMMA(__nv_bfloat16, "bf16", COLS, __VA_ARGS__) \
  FA_WGMMA(__half, "f16", COLS, __VA_ARGS__)
FA_WGMMA_OF_COLS(48, "%24", "%25", "%26", "%27", "%28", "%29")
FA_WGMMA_OF_COLS(64, "%32", "%33", "%34", "%35", "%36", "%37")
FA_WGMMA_OF_COLS(80, "%40", "%41", "%42", "%43", "%44", "%45")
FA_WGMMA_OF_COLS(96, "%48", "%49", "%50", "%51", "%52", "%53")
FA_WGMMA_OF_COLS(112, "%56", "%57", "%58", "%59", "%60", "%61")
FA_WGMMA_OF_COLS(128, "%64", "%65", "%66", "%67", "%68", "%69")
FA_WGMMA_OF_COLS(192, "%96", "%97", "%98", "%99", "%100", "%101")
FA_WGMMA_OF_COLS(256, "%128", "%129", "%130", "%131", "%132", "%133")
#undef FA_WGMMA_OF_COLS
#undef FA_WGMMA
#undef FA_NAMES_256
#undef FA_BLOCKS_256
#undef FA_NAMES_192
#undef FA_BLOCKS_192
#undef FA_NAMES_128
#undef FA_BLOCKS_128
#undef FA_NAMES_112
#undef FA_BLOCKS_112
#undef FA_NAMES_96
#undef FA_BLOCKS_96
#undef FA_NAMES_80
#undef FA_BLOCKS_80
#undef FA_NAMES_64
#undef FA_BLOCKS_64
#undef FA_NAMES_48
#undef FA_BLOCKS_48
#undef FA_BLOCK

}  // namespace fa::ptx
