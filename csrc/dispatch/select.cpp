// SPDX-License-Identifier: BSD-3-Clause
#include "dispatch/select.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "common/check.h"

// Set by the build as a bare list, for example sm_80,compute_80,sm_90a: no quotes to lose on the
// way.
#ifndef FA_COMPILED_ARCHS
#define FA_COMPILED_ARCHS
#endif
#define FA_TEXT(...) #__VA_ARGS__
#define FA_TEXT_OF(...) FA_TEXT(__VA_ARGS__)

namespace fa {
namespace {

constexpr int kOldestSm80Family = 80;
constexpr int kHopper = 90;

bool has_machine_code(int compute_capability) {
  static const std::vector<std::string> architectures = compiled_architectures();
  return compute_capability >= kOldestSm80Family && runs_on(architectures, compute_capability);
}

// Hopper's kernels exist as machine code for it alone.
bool lacks_architecture_of(const KernelConfig& config) {
  const std::vector<std::string> built = compiled_architectures();
  return config.family == Family::kSm90 &&
         std::find(built.begin(), built.end(), "sm_90a") == built.end();
}

std::string join(const std::vector<std::string>& words) {
  std::string joined;
  for (const std::string& word : words) {
    joined += (joined.empty() ? "" : ", ") + word;
  }
  return joined;
}

// The most helpful reason of all: what the first of the rows nearest to running the problem lacks.
[[noreturn]] void throw_no_row(const Problem& problem) {
  const char* device = problem.on_cuda ? "CUDA" : "the CPU";
  int largest_head_dim = 0;
  Verdict nearest = Verdict::kOtherPass;
  int nearest_row = 0;
  for (int row = 0; row < kNumRows; ++row) {
    const Verdict verdict = judge(row, problem);
    if (verdict == Verdict::kHeadDim) {
      largest_head_dim = std::max(largest_head_dim, table::kRows[row].head_dim);
    }
    if (verdict > nearest) {
      nearest = verdict;
      nearest_row = row;
    }
  }
  switch (nearest) {
    case Verdict::kNoMachineCode:
      throw Error(ErrorKind::kNotImplemented, describe(nearest, nearest_row, problem));
    case Verdict::kDtype:
      throw Error(ErrorKind::kType,
                  concat("q, k, v: expected bfloat16, float16 or float32 on ", device, ", got ",
                         name_of(problem.dtype), "; cast them or call under torch.autocast"));
    case Verdict::kHeadDim:
      throw Error(
          ErrorKind::kValue,
          concat("head_dim of q, k, v: expected at most ", largest_head_dim, " in ",
                 name_of(tensor_dtype(problem.dtype)), " on ", device, ", got ", problem.head_dim));
    default:
      throw Error(
          ErrorKind::kNotImplemented,
          concat("no kernel runs this problem on ", device, "; nearest is ",
                 table::kRows[nearest_row].name(), ": ", describe(nearest, nearest_row, problem)));
  }
}

}  // namespace

Verdict judge(int row, const Problem& problem) {
  const KernelConfig& config = table::kRows[row];
  if (config.pass != problem.pass) {
    return Verdict::kOtherPass;
  }
  if ((config.family != Family::kCpu) != problem.on_cuda) {
    return Verdict::kOtherDevice;
  }
  if (config.family == Family::kSm90 && problem.device.compute_capability != kHopper) {
    return Verdict::kOtherGpu;
  }
  if (problem.on_cuda && !has_machine_code(problem.device.compute_capability)) {
    return Verdict::kNoMachineCode;
  }
  if (config.dtype != problem.dtype) {
    return Verdict::kDtype;
  }
  if (problem.head_dim > config.head_dim) {
    return Verdict::kHeadDim;
  }
  if (config.mask == MaskMode::kFull && !problem.full_mask) {
    return Verdict::kMask;
  }
  if (config.score == ScoreMode::kPlain && problem.general_scores) {
    return Verdict::kScores;
  }
  if (problem.softcap && !config.has_softcap()) {
    return Verdict::kSoftcap;
  }
  if (problem.on_cuda && !config.fits(problem.device.smem_opt_in)) {
    return Verdict::kSharedMemory;
  }
  return registry().kernels[row].present() ? Verdict::kRuns : Verdict::kNotBuilt;
}

int select_row(const Problem& problem) {
  for (int row = 0; row < kNumRows; ++row) {
    if (judge(row, problem) == Verdict::kRuns) {
      return row;
    }
  }
  throw_no_row(problem);
}

std::string describe(Verdict verdict, int row, const Problem& problem) {
  const KernelConfig& config = table::kRows[row];
  switch (verdict) {
    case Verdict::kRuns:
      return "runs";
    case Verdict::kOtherPass:
      return config.pass == Pass::kForward ? "a forward kernel" : "a backward kernel";
    case Verdict::kOtherDevice:
      return config.family == Family::kCpu ? "for CPU tensors" : "for CUDA tensors";
    case Verdict::kOtherGpu:
      return "for GPUs of compute capability 9.0";
    case Verdict::kNoMachineCode:
      return concat("no kernel for sm_", problem.device.compute_capability,
                    "; compiled: ", join(compiled_architectures()));
    case Verdict::kDtype:
      return concat("for ", name_of(config.dtype), ", not ", name_of(problem.dtype));
    case Verdict::kHeadDim:
      return concat("head_dim ", problem.head_dim, " is more than this row's ", config.head_dim);
    case Verdict::kMask:
      return "for full attention only";
    case Verdict::kScores:
      return "for scores without bias, masks, documents, prefixes and terms such as softcap";
    case Verdict::kSoftcap:
      return "for scores without softcap";
    case Verdict::kSharedMemory:
      return concat("needs ", config.smem_bytes(), " bytes of shared memory",
                    config.blocks > 1 ? concat(" for each of ", config.blocks, " blocks") : "",
                    "; a block of this device has at most ", problem.device.smem_opt_in);
    case Verdict::kNotBuilt:
      return concat("left out of this build; rebuild with ",
                    lacks_architecture_of(config)
                        ? "FA_CUDA_ARCHS naming 90a"
                        : concat("FA_HEAD_DIMS naming ", config.head_dim));
  }
  return "";
}

std::vector<std::string> compiled_architectures() {
  std::istringstream stream(FA_TEXT_OF(FA_COMPILED_ARCHS));
  std::vector<std::string> architectures;
  for (std::string name; std::getline(stream, name, ',');) {
    architectures.push_back(name);
  }
  return architectures;
}

bool runs_on(const std::vector<std::string>& architectures, int compute_capability) {
  const std::string cubin = "sm_";
  const std::string ptx = "compute_";
  return std::any_of(architectures.begin(), architectures.end(), [&](const std::string& name) {
    const bool is_cubin = name.starts_with(cubin);
    const int built_for = std::atoi(name.c_str() + (is_cubin ? cubin : ptx).size());
    if (name.ends_with('a')) {
      return compute_capability == built_for;
    }
    const bool same_major = compute_capability / 10 == built_for / 10;
    return compute_capability >= built_for && (same_major || !is_cubin);
  });
}

}  // namespace fa
