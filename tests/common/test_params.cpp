// SPDX-License-Identifier: BSD-3-Clause
// Offsets into tensors of more than 2^31 elements, against 128-bit arithmetic.
#include "common/params.h"

#include <cstdint>
#include <iterator>
#include <limits>

#include "tests/support/check.h"

namespace {

using fa::RowStatistics;
using fa::Shape;
using fa::TensorView;
using Wide = __int128;

constexpr int64_t k2To31 = int64_t{1} << 31;
constexpr int64_t k2To33 = int64_t{1} << 33;
constexpr int64_t kEdges[] = {0, 1, k2To31 - 1, k2To31, k2To31 + 1, k2To33};

bool representable(Wide value) { return value <= std::numeric_limits<int64_t>::max(); }

// A stride of 0 is an expanded dimension; strides of a tensor are never negative.
void check_tensor_offsets() {
  for (const int64_t batch_stride : kEdges) {
    for (const int64_t row_stride : kEdges) {
      for (const int64_t head_stride : kEdges) {
        const TensorView view{nullptr, batch_stride, row_stride, head_stride};
        for (const int64_t batch : {0, 1, 3}) {
          for (const int64_t row : {0, 1, (1 << 29) - 1}) {
            for (const int64_t head : {0, 1, 127}) {
              const Wide expected =
                  Wide{batch} * batch_stride + Wide{row} * row_stride + Wide{head} * head_stride;
              if (representable(expected)) {
                FA_EXPECT(view.offset(batch, row, head) == expected, "strides", batch_stride,
                          row_stride, head_stride, "at", batch, row, head);
              }
            }
          }
        }
      }
    }
  }
}

// Each edge reached by one index alone, as a contiguous tensor reaches it.
void check_each_index_reaches_each_edge() {
  for (const int64_t edge : kEdges) {
    FA_EXPECT_EQ((TensorView{nullptr, edge, 0, 0}.offset(1, 5, 5)), edge);
    FA_EXPECT_EQ((TensorView{nullptr, 0, edge, 0}.offset(5, 1, 5)), edge);
    FA_EXPECT_EQ((TensorView{nullptr, 0, 0, edge}.offset(5, 5, 1)), edge);
    FA_EXPECT_EQ((TensorView{nullptr, 1, 0, 0}.offset(edge, 5, 5)), edge);
    FA_EXPECT_EQ((TensorView{nullptr, 0, 1, 0}.offset(5, edge, 5)), edge);
    FA_EXPECT_EQ((TensorView{nullptr, 0, 0, 1}.offset(5, 5, edge)), edge);
  }
}

void check_rows_are_typed() {
  double elements[64] = {};
  const TensorView view{elements, 32, 8, 4};
  FA_EXPECT_EQ(view.row<double>(1, 2, 1), elements + 32 + 16 + 4);
  const TensorView expanded{elements, 0, 8, 0};
  FA_EXPECT_EQ(expanded.row<double>(7, 3, 9), elements + 24);
}

void check_row_statistics() {
  float* const data = nullptr;  // only distances are looked at
  for (const int64_t head_stride : {int64_t{0}, int64_t{1}, k2To31 - 1, k2To31 + 1}) {
    for (const int64_t batch_stride : {int64_t{0}, head_stride, 128 * head_stride}) {
      const RowStatistics statistics{data, batch_stride, head_stride};
      for (const int64_t batch : {0, 1, 1023}) {
        for (const int64_t head : {0, 1, 127}) {
          const auto address = reinterpret_cast<uintptr_t>(statistics.row<float>(batch, head));
          const Wide expected = Wide{batch} * batch_stride + Wide{head} * head_stride;
          FA_EXPECT(address == expected * sizeof(float), "strides", batch_stride, head_stride, "at",
                    batch, head);
        }
      }
    }
  }
}

void check_group_size() {
  const Shape shape{.batch = 1,
                    .num_heads = 12,
                    .num_heads_kv = 3,
                    .seqlen_q = 1,
                    .seqlen_k = 1,
                    .head_dim = 64,
                    .head_dim_v = 64};
  FA_EXPECT_EQ(shape.group_size(), 4);
}

}  // namespace

int main() {
  check_tensor_offsets();
  check_each_index_reaches_each_edge();
  check_rows_are_typed();
  check_row_statistics();
  check_group_size();
  return fa::test::report("common/test_params");
}
