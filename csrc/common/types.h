// SPDX-License-Identifier: BSD-3-Clause
// The vocabulary every layer shares.
#pragma once

#if defined(__CUDACC__)
#define FA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FA_HOST_DEVICE inline
#endif

namespace fa {

// kTf32: of kernels alone, for float32 tensors: they round factors of products to 11 significant
// bits, as tensor cores take them, where those of kFloat32 keep all.
enum class Dtype { kFloat64, kFloat32, kFloat16, kBFloat16, kTf32 };
enum class Pass { kForward, kBackward };

// kFull: every query sees every key. kWindow: a bottom-right aligned band; causal is one such band.
enum class MaskMode { kFull, kWindow };

// kPlain: scores are softmax_scale * q k^T. kRules: with the rules of common/score_rules.h, but for
// softcap and dropout. kGeneral: with all of them.
enum class ScoreMode { kPlain, kRules, kGeneral };

// A set of kernels that share an instruction set; see dispatch/kernel_table.h.
enum class Family { kCpu, kSm80, kSm90 };

constexpr const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return "float64";
    case Dtype::kFloat32:
      return "float32";
    case Dtype::kTf32:
      return "tf32";
    case Dtype::kFloat16:
      return "float16";
    case Dtype::kBFloat16:
      return "bfloat16";
  }
  return "";
}

// Of the tensors that a kernel of this dtype runs.
constexpr Dtype tensor_dtype(Dtype dtype) {
  return dtype == Dtype::kTf32 ? Dtype::kFloat32 : dtype;
}

constexpr int bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : tensor_dtype(dtype) == Dtype::kFloat32 ? 4 : 2;
}

constexpr const char* name_of(Pass pass) { return pass == Pass::kForward ? "fwd" : "bwd"; }
constexpr const char* name_of(MaskMode mask) { return mask == MaskMode::kFull ? "full" : "window"; }

constexpr const char* name_of(ScoreMode score) {
  return score == ScoreMode::kPlain ? "plain" : score == ScoreMode::kRules ? "rules" : "general";
}

constexpr const char* name_of(Family family) {
  switch (family) {
    case Family::kCpu:
      return "cpu";
    case Family::kSm80:
      return "sm80";
    case Family::kSm90:
      return "sm90";
  }
  return "";
}

}  // namespace fa
