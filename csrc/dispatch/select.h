// SPDX-License-Identifier: BSD-3-Clause
// Problem -> row of the kernel table, or a sentence saying why none fits. Pure: it reads the table,
// the registry and its argument, so every decision can be tested without a GPU.
#pragma once

#include <string>
#include <vector>

#include "dispatch/registry.h"

namespace fa {

struct Problem {
  Pass pass;
  Dtype dtype;
  int head_dim;         // the larger one of q and k, and of v
  bool full_mask;       // every query sees every key
  bool general_scores;  // with rules of common/score_rules.h
  bool softcap;         // among them
  bool on_cuda;         // else on the CPU
  CudaDevice device;    // read where on_cuda
};

// What keeps a row from running a problem; the first that applies.
enum class Verdict {
  kRuns,
  kOtherPass,
  kOtherDevice,
  kOtherGpu,
  kNoMachineCode,
  kDtype,
  kHeadDim,
  kMask,
  kScores,
  kSoftcap,
  kSharedMemory,
  kNotBuilt,
};

Verdict judge(int row, const Problem& problem);

// The first row of the table that runs the problem. Throws fa::Error where none does.
int select_row(const Problem& problem);

// The sentence for a verdict, for example "head_dim 256 is more than this row's 128".
std::string describe(Verdict verdict, int row, const Problem& problem);

// CUDA machine code in this build, for example {"sm_80", "sm_90a", "compute_80"}; empty in a build
// without CUDA.
std::vector<std::string> compiled_architectures();

// Whether machine code for one of the architectures runs on a device of this compute capability:
// sm_80 on 8.x from 8.0 on, sm_90a on 9.0 alone, and compute_80 (PTX that the driver compiles)
// on 8.0 and all newer ones.
bool runs_on(const std::vector<std::string>& architectures, int compute_capability);

}  // namespace fa
