// SPDX-License-Identifier: BSD-3-Clause
// Every device that the README promises runs every head_dim, no row of the kernel table is in vain,
// and the table's visitors miss none.
#include <array>
#include <cstdint>
#include <set>
#include <string>

#include "dispatch/kernel_table.h"
#include "dispatch/registry.h"
#include "tests/support/check.h"

namespace {

using namespace fa;
using namespace fa::table;  // kSm80, kForward, kBFloat16, kWindow, ...

// The most shared memory of a block on the GPUs that the sm80 family runs on: compute capability
// 8.6, 8.9, 12.0; 8.0 and 8.7; 9.0 and 10.0.
constexpr int64_t kSmemOptIns[] = {99 * 1024, 163 * 1024, 227 * 1024};

constexpr int kLargestHeadDim = 512;
constexpr int kLargestFloat32HeadDim = 256;  // of sm80

// With kernels for Hopper alone.
constexpr int kLargestHeadDimOfHopper = 256;

struct Choice {
  Family family;
  Pass pass;
  Dtype dtype;
  int head_dim;
  bool full_mask;
  ScoreMode score;
  int64_t smem_opt_in;
};

// First match wins; kNumRows where there is none.
int first_row(const Choice& choice) {
  for (int row = 0; row < kNumRows; ++row) {
    const KernelConfig& config = kRows[row];
    if (config.family == choice.family && config.pass == choice.pass &&
        config.dtype == choice.dtype && config.head_dim >= choice.head_dim &&
        (config.mask == kWindow || choice.full_mask) && config.score >= choice.score &&
        config.fits(choice.smem_opt_in)) {
      return row;
    }
  }
  return kNumRows;
}

// Every device has a row for each of its problems, and every row is some problem's.
void check_choices() {
  std::array<bool, kNumRows> chosen{};
  const auto check = [&chosen](const Choice& choice) {
    const int row = first_row(choice);
    FA_EXPECT(row < kNumRows, name_of(choice.family), name_of(choice.pass), name_of(choice.dtype),
              "head_dim", choice.head_dim, "full", choice.full_mask, name_of(choice.score), "on",
              choice.smem_opt_in);
    if (row < kNumRows) {
      chosen[row] = true;
    }
  };
  for (const Pass pass : {kForward, kBackward}) {
    for (int head_dim = 1; head_dim <= kLargestHeadDim; ++head_dim) {
      for (const bool full_mask : {false, true}) {
        for (const ScoreMode score : {kPlain, kRules, kGeneral}) {
          for (const int64_t smem_opt_in : kSmemOptIns) {
            check({kSm80, pass, kBFloat16, head_dim, full_mask, score, smem_opt_in});
            check({kSm80, pass, kFloat16, head_dim, full_mask, score, smem_opt_in});
            if (head_dim <= kLargestFloat32HeadDim) {
              check({kSm80, pass, kFloat32, head_dim, full_mask, score, smem_opt_in});
              check({kSm80, pass, kTf32, head_dim, full_mask, score, smem_opt_in});
            }
          }
          for (const Dtype dtype : {kFloat64, kFloat32, kFloat16, kBFloat16}) {
            check({kCpu, pass, dtype, head_dim, full_mask, score, 0});
          }
        }
        if (head_dim <= kLargestHeadDimOfHopper) {
          for (const ScoreMode score : {kPlain, kRules, kGeneral}) {
            check({kSm90, pass, kBFloat16, head_dim, full_mask, score, kSmemOptIns[2]});
            check({kSm90, pass, kFloat16, head_dim, full_mask, score, kSmemOptIns[2]});
          }
        }
      }
    }
  }
  for (int row = 0; row < kNumRows; ++row) {
    FA_EXPECT(chosen[row], "row", row, kRows[row].name(), "is the first choice of no problem");
  }
}

void check_each_row() {
  std::set<std::string> names;
  for (const KernelConfig& row : kRows) {
    const std::string name = row.name();
    FA_EXPECT(names.insert(name).second, "a second row called", name);
    FA_EXPECT(row.tile_m > 0 && row.tile_n > 0 && row.head_dim > 0, name);
    if (row.family == kCpu) {
      FA_EXPECT_EQ(row.smem_bytes(), 0, name);
      FA_EXPECT_EQ(row.threads(), 0, name);
      continue;
    }
    FA_EXPECT(row.smem_bytes() > 0, name);
    FA_EXPECT(row.blocks >= 1, name);
    FA_EXPECT(32 <= row.threads() && row.threads() <= 1024, name, "has threads", row.threads());
    FA_EXPECT(row.head_dim % 16 == 0, name, "feeds the tensor cores 16 elements at a time");
    FA_EXPECT(bytes_of(row.dtype) == 2 || row.family == kSm80, name);
  }
  FA_EXPECT_EQ(static_cast<int>(names.size()), kNumRows);
  KernelConfig row = {kSm80, kBackward, kFloat16, 96, kWindow, kPlain, 64, 128, 8, 1};
  FA_EXPECT_EQ(row.name(), "flash_bwd_sm80_float16_d96_window_64x128");
  row.score = kRules;
  FA_EXPECT_EQ(row.name(), "flash_bwd_sm80_float16_d96_window_rules_64x128");
  row.score = kGeneral;
  FA_EXPECT_EQ(row.name(), "flash_bwd_sm80_float16_d96_window_general_64x128");
}

// Two blocks that take half of a multiprocessor each; a byte more and there is room for one.
void check_fits() {
  KernelConfig row = {kSm80, kForward, kBFloat16, 64, kWindow, kPlain, 128, 64, 4, 1};
  const int64_t bytes = row.smem_bytes();
  FA_EXPECT_EQ(bytes, (128 + 4 * 64) * 64 * 2);
  FA_EXPECT(row.fits(bytes) && !row.fits(bytes - 1));
  row.dtype = kTf32;
  FA_EXPECT_EQ(row.smem_bytes(), 2 * bytes, "elements of 32 bits");
  row.dtype = kBFloat16;
  row.blocks = 2;
  FA_EXPECT(row.fits(2 * bytes + 1024) && !row.fits(2 * bytes + 1023));
}

// How many tiles of q, and of k and v, Hopper's forward has room for.
void check_stages() {
  for (const KernelConfig& row : kRows) {
    if (row.family == kSm90 && row.pass == kForward) {
      FA_EXPECT_EQ(row.q_stages(), row.head_dim <= 128 ? 2 : 1, row.name());
      FA_EXPECT_EQ(row.kv_stages(), row.head_dim <= 64 ? 4 : 2, row.name());
    }
  }
}

// For how many tiles of keys and values there is room where Hopper's gradient of a bias is
// computed.
void check_dbias_stages() {
  for (const KernelConfig& row : kRows) {
    if (row.family == kSm90 && row.pass == kBackward && row.score == kGeneral) {
      FA_EXPECT_EQ(row.dbias_key_stages(), row.head_dim <= 192 ? 2 : 1, row.name());
      FA_EXPECT(row.smem_bytes() >= row.sm90_dbias_smem_bytes(), row.name());
      FA_EXPECT(row.smem_bytes() <= kSmemOptIns[2], row.name());
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
  check_choices();
  check_each_row();
  check_fits();
  check_stages();
  check_dbias_stages();
  check_visits<kSm80, 64, 96, 128, 192, 256, 512>();
  check_visits<kSm90, 64, 96, 128, 192, 256>();
  check_visits<kCpu, kLargestHeadDim>();
  check_registry();
  return fa::test::report("dispatch/test_table");
}
