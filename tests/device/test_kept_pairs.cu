// SPDX-License-Identifier: BSD-3-Clause
// What dropout keeps, as Hopper's warps find it for themselves and for each other, in the values
// and in the operands of an mma, against the host. None of it needs a GPU of compute
// capability 9.0. Prints a line per check; returns 0 if all hold, 1 if one does not, 77 without a
// GPU.
#include <cuda_bf16.h>

#include <string>

#include "common/check.h"
#include "device/convert.cuh"
#include "sm90/kept_pairs.cuh"
#include "tests/support/cuda_blocks.h"

namespace {

using namespace fa;
using namespace fa::test;

constexpr int kBatch = 1;
constexpr int kHead = 2;
constexpr int kNumHeads = 3;
constexpr float kScale = 1.5f;

// Of ones, what is kept of scaled values and of elements.
template <typename Tile, typename Kept>
__device__ void dump_kept(const Kept& kept, float* g_values, float* g_elements, int stride, int row,
                          int col) {
  const auto ones = [](float, int, int, int) { return 1.0f; };
  Tile r_values;
  r_values.transform(ones);
  auto r_elements = device::to_operand<__nv_bfloat16>(r_values);
  kept.keep(r_values, kScale);
  dump(r_values, g_values, stride, row, col);
  kept.drop(r_elements);
  r_values.transform([&](float, int half, int block, int i) {
    const uint32_t pair = r_elements.r[0][block / 2][block % 2 * 2 + half];
    return __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xFFFF0000);
  });
  dump(r_values, g_elements, stride, row, col);
}

// Queries by keys, by one warp for 16 queries.
template <int kKeys>
__global__ void kept_keys_kernel(const __grid_constant__ Dropout dropout, int first_query,
                                 int first_key, float* g_values, float* g_elements) {
  using Kept = sm90::KeptPairs<kKeys, false>;
  using Tile = device::Accumulator<device::kBlockRows, kKeys>;
  const DropoutOfHead of_head(dropout, kBatch, kHead, kNumHeads);
  Kept kept;
  kept.find(of_head, first_query, first_key);
  dump_kept<Tile>(kept, g_values, g_elements, kKeys, 0, 0);
}

// Keys by queries, by two warps for 16 keys each.
template <int kQueries>
__global__ void kept_queries_kernel(const __grid_constant__ Dropout dropout, int first_query,
                                    int first_key, float* g_values, float* g_elements) {
  using Tile = device::Accumulator<device::kBlockRows, kQueries>;
  using Kept = sm90::KeptPairs<kQueries, true>;
  const DropoutOfHead of_head(dropout, kBatch, kHead, kNumHeads);
  const int row = ptx::warp_index() * device::kBlockRows;
  Kept kept;
  kept.find(of_head, first_query, first_key + row);
  dump_kept<Tile>(kept, g_values, g_elements, kQueries, row, 0);
}

template <auto kKernel>
void test_kept(const std::string& name, int warps, int cols, bool rows_are_keys) {
  const int rows = warps * device::kBlockRows;
  Managed<int64_t> rng_state(2);
  rng_state[0] = 0x123456789abcdef;
  rng_state[1] = -5;
  for (const double dropout_p : {0.1, 0.5, 1.0}) {
    for (const int first_query : {0, 48, 4096}) {
      for (const int first_key : {0, 32, 1 << 20}) {
        const Dropout dropout = Dropout::of(dropout_p, rng_state.data);
        const DropoutOfHead of_head(dropout, kBatch, kHead, kNumHeads);
        Managed<float> values(rows * cols, kUntouched);
        Managed<float> elements(rows * cols, kUntouched);
        run<kKernel>(1, 32 * warps, 0, dropout, first_query, first_key, values.data, elements.data);
        const auto keeps = [&](int r, int c) {
          return of_head.keeps(first_query + (rows_are_keys ? c : r),
                               first_key + (rows_are_keys ? r : c));
        };
        const std::string where = concat(name, ", dropout of ", dropout_p, ", queries from ",
                                         first_query, ", keys from ", first_key);
        expect(
            where, rows, cols, 0, [&](int r, int c) { return values[r * cols + c]; },
            [&](int r, int c) { return keeps(r, c) ? kScale : 0.0f; });
        expect(
            where + ", elements", rows, cols, 0,
            [&](int r, int c) { return elements[r * cols + c]; },
            [&](int r, int c) { return keeps(r, c) ? 1.0f : 0.0f; });
      }
    }
  }
}

void test_all() {
  test_kept<kept_keys_kernel<64>>("64 keys", 1, 64, false);
  test_kept<kept_keys_kernel<128>>("128 keys", 1, 128, false);
  test_kept<kept_queries_kernel<64>>("64 queries", 2, 64, true);
  test_kept<kept_queries_kernel<128>>("128 queries", 2, 128, true);
}

}  // namespace

int main() { return run_tests(test_all); }
