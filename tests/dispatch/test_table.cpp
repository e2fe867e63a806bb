// SPDX-License-Identifier: BSD-3-Clause
// The kernel table keeps what the README promises, and its visitors miss no row.
#include <array>
#include <initializer_list>
#include <set>
#include <string>

#include "dispatch/kernel_table.h"
#include "dispatch/registry.h"
#include "tests/support/check.h"

namespace {

using namespace fa;
using namespace fa::table;  // kSm80, kForward, kBFloat16, kFull, ...

bool promised(Family family, Pass pass, Dtype dtype, MaskMode mask, int head_dim) {
  for (const KernelConfig& row : kRows) {
    if (row.family == family && row.pass == pass && row.dtype == dtype && row.mask == mask &&
        row.head_dim == head_dim) {
      return true;
    }
  }
  return false;
}

void check_promises() {
  for (const Pass pass : {kForward, kBackward}) {
    for (const Dtype dtype : {kBFloat16, kFloat16}) {
      for (const MaskMode mask : {kFull, kWindow}) {
        for (const int head_dim : {64, 128}) {
          FA_EXPECT(promised(kSm80, pass, dtype, mask, head_dim), name_of(pass), name_of(dtype),
                    name_of(mask), head_dim);
        }
      }
    }
    for (const Dtype dtype : {kFloat64, kFloat32, kFloat16, kBFloat16}) {
      FA_EXPECT(promised(kCpu, pass, dtype, kWindow, 512), name_of(pass), name_of(dtype));
    }
  }
}

void check_each_row() {
  std::set<std::string> names;
  for (const KernelConfig& row : kRows) {
    const std::string name = row.name();
    FA_EXPECT(names.insert(name).second, "a second row called", name);
    FA_EXPECT(row.tile_m > 0 && row.tile_n > 0 && row.head_dim > 0, name);
    FA_EXPECT(row.smem_bytes() <= kSmallestSmemOptIn, name, "asks for", row.smem_bytes());
    if (row.family == kCpu) {
      FA_EXPECT_EQ(row.smem_bytes(), 0, name);
      FA_EXPECT_EQ(row.threads(), 0, name);
      continue;
    }
    FA_EXPECT(row.smem_bytes() > 0, name);
    FA_EXPECT(32 <= row.threads() && row.threads() <= 1024, name, "has threads", row.threads());
    FA_EXPECT(row.head_dim % 16 == 0, name, "feeds the tensor cores 16 elements at a time");
    FA_EXPECT(row.dtype == kFloat16 || row.dtype == kBFloat16, name);
  }
  FA_EXPECT_EQ(static_cast<int>(names.size()), kNumRows);
  FA_EXPECT_EQ(kRows[0].name(), "flash_fwd_sm80_bfloat16_d64_full");
}

// First match wins: a row is dead where an earlier one runs everything that it runs.
void check_no_row_is_dead() {
  for (int later = 0; later < kNumRows; ++later) {
    for (int earlier = 0; earlier < later; ++earlier) {
      const KernelConfig& row = kRows[later];
      const KernelConfig& before = kRows[earlier];
      const bool covered = before.family == row.family && before.pass == row.pass &&
                           before.dtype == row.dtype && before.head_dim >= row.head_dim &&
                           (before.mask == kWindow || before.mask == row.mask);
      FA_EXPECT(!covered, row.name(), "is never reached, because of", before.name());
    }
  }
}

template <Family kFamily, Pass kPass, int kHeadDim>
void count_visits(std::array<int, kNumRows>& visits) {
  for_each_row<kFamily, kPass, kHeadDim>([&]<int kRow>() {
    constexpr KernelConfig kConfig = kRows[kRow];
    static_assert(kConfig.family == kFamily && kConfig.pass == kPass);
    static_assert(kConfig.head_dim == kHeadDim);
    ++visits[kRow];
  });
}

template <Family kFamily, int... kHeadDims>
void check_visits() {
  std::array<int, kNumRows> visits{};
  (count_visits<kFamily, kForward, kHeadDims>(visits), ...);
  (count_visits<kFamily, kBackward, kHeadDims>(visits), ...);
  for (int row = 0; row < kNumRows; ++row) {
    FA_EXPECT_EQ(visits[row], kRows[row].family == kFamily ? 1 : 0, kRows[row].name());
  }
}

// A registered kernel serves the pass of its row and no other.
void check_registry() {
  for (int row = 0; row < kNumRows; ++row) {
    const RegisteredKernel& kernel = registry().kernels[row];
    if (!kernel.present()) {
      continue;
    }
    FA_EXPECT_EQ(kernel.forward != nullptr, kRows[row].pass == kForward, kRows[row].name());
    FA_EXPECT_EQ(kernel.backward != nullptr, kRows[row].pass == kBackward, kRows[row].name());
    FA_EXPECT_EQ(kernel.resources != nullptr, kRows[row].family != kCpu, kRows[row].name());
  }
}

}  // namespace

int main() {
  check_promises();
  check_each_row();
  check_no_row_is_dead();
  check_visits<kSm80, 64, 128>();
  check_visits<kCpu, 512>();
  check_registry();
  return fa::test::report("dispatch/test_table");
}
