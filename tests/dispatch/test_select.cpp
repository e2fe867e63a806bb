// SPDX-License-Identifier: BSD-3-Clause
// The sentences of selection that depend on a device, of which this needs none.
#include "dispatch/select.h"

#include <algorithm>
#include <string>
#include <vector>

#include "tests/support/check.h"

namespace {

using namespace fa;

constexpr int64_t kSmemOptIn = 16 * 1024;  // less than any row of CUDA needs
constexpr Problem kProblem = {.pass = Pass::kForward,
                              .dtype = Dtype::kBFloat16,
                              .head_dim = 64,
                              .full_mask = true,
                              .on_cuda = true,
                              .device = {80, kSmemOptIn}};

void check_shared_memory() {
  for (int row = 0; row < kNumRows; ++row) {
    const KernelConfig& config = table::kRows[row];
    if (config.family == Family::kCpu) {
      continue;
    }
    FA_EXPECT(!config.fits(kSmemOptIn), config.name());
    const std::string blocks =
        config.blocks == 1 ? "" : " for each of " + std::to_string(config.blocks) + " blocks";
    FA_EXPECT_EQ(describe(Verdict::kSharedMemory, row, kProblem),
                 "needs " + std::to_string(config.smem_bytes()) + " bytes of shared memory" +
                     blocks + "; a block of this device has at most 16384");
  }
}

void check_left_out() {
  const std::vector<std::string> built = compiled_architectures();
  const bool for_hopper = std::find(built.begin(), built.end(), "sm_90a") != built.end();
  for (int row = 0; row < kNumRows; ++row) {
    const KernelConfig& config = table::kRows[row];
    FA_EXPECT_EQ(describe(Verdict::kNotBuilt, row, kProblem),
                 config.family == Family::kSm90 && !for_hopper
                     ? "left out of this build; rebuild with FA_CUDA_ARCHS naming 90a"
                     : "left out of this build; rebuild with FA_HEAD_DIMS naming " +
                           std::to_string(config.head_dim),
                 config.name());
  }
}

}  // namespace

int main() {
  check_shared_memory();
  check_left_out();
  return fa::test::report("dispatch/test_select");
}
