// SPDX-License-Identifier: BSD-3-Clause
// The sentences of selection that depend on a device, and which rows run rules for scores. This
// needs no device.
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
                              .general_scores = false,
                              .softcap = false,
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

// Rules keep a problem from rows of plain scores, from no others, and change no earlier verdict.
void check_scores() {
  for (const bool on_cuda : {false, true}) {
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      Problem plain = kProblem;
      plain.pass = pass;
      plain.on_cuda = on_cuda;
      plain.device = {90, int64_t{227} * 1024};
      Problem general = plain;
      general.general_scores = true;
      for (int row = 0; row < kNumRows; ++row) {
        const KernelConfig& config = table::kRows[row];
        const Verdict verdict = judge(row, plain);
        const bool refused = config.score == ScoreMode::kPlain && verdict > Verdict::kScores;
        const bool would_run = verdict == Verdict::kRuns && config.score == ScoreMode::kPlain;
        FA_EXPECT(verdict != Verdict::kScores, config.name());
        FA_EXPECT(judge(row, general) == (refused || would_run ? Verdict::kScores : verdict),
                  config.name());
        FA_EXPECT_EQ(
            describe(Verdict::kScores, row, general),
            "for scores without bias, masks, documents, prefixes and terms such as softcap");
        // Terms keep it from rows that lack them as well, and change no earlier verdict either.
        const Verdict of_general = judge(row, general);
        const bool lacks = of_general > Verdict::kScores || of_general == Verdict::kRuns;
        FA_EXPECT(of_general != Verdict::kSoftcap, config.name());
        Problem with_softcap = general;
        with_softcap.softcap = true;
        const Verdict of_softcap = lacks && !config.has_softcap() ? Verdict::kSoftcap : of_general;
        FA_EXPECT(judge(row, with_softcap) == of_softcap, config.name());
      }
      if (!on_cuda) {
        FA_EXPECT_EQ(select_row(general), select_row(plain));
      }
    }
  }
}

}  // namespace

int main() {
  check_shared_memory();
  check_left_out();
  check_scores();
  return fa::test::report("dispatch/test_select");
}
