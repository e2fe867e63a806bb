// SPDX-License-Identifier: BSD-3-Clause
// The operator that shows what dropout keeps, for tests and for people; no kernel needs it.
#include <limits>

#include "api/launch.h"
#include "api/terms.h"
#include "common/check.h"

namespace fa::api {
namespace {

int check_count(const char* name, int64_t count, int64_t limit) {
  check(count >= 0 && count <= limit, ErrorKind::kValue, name, ": expected 0 to ", limit, ", got ",
        count);
  return static_cast<int>(count);
}

}  // namespace

// rng_state (2) int64 -> (batch, heads, seqlen_q, seqlen_k) bool, True where a probability is kept.
Tensor dropout_mask(const Tensor& state_tensor, double dropout_p, int64_t batch, int64_t heads,
                    int64_t seqlen_q, int64_t seqlen_k) {
  const Argument state{"rng_state", state_tensor};
  const Tensor readable_state = readable_rng_state(state);
  check_dropout_p(dropout_p);
  constexpr int64_t kIntLimit = std::numeric_limits<int>::max();
  DropoutMask mask = {.dropout = Dropout::of(
                          dropout_p, static_cast<const int64_t*>(readable_state.const_data_ptr())),
                      .batch = check_count("batch", batch, kIntLimit),
                      .num_heads = check_count("heads", heads, kIntLimit),
                      .seqlen_q = check_count("seqlen_q", seqlen_q, kMaxSeqlen),
                      .seqlen_k = check_count("seqlen_k", seqlen_k, kMaxSeqlen),
                      .kept = nullptr};
  Tensor result = torch::stable::new_empty(state_tensor, {batch, heads, seqlen_q, seqlen_k},
                                           torch::headeronly::ScalarType::Bool);
  if (result.numel() > 0) {
    mask.kept = static_cast<uint8_t*>(result.mutable_data_ptr());
    fill_dropout_mask(mask, state);
  }
  return result;
}

}  // namespace fa::api

STABLE_TORCH_LIBRARY_FRAGMENT(flash_attn_cuda, library) {
  library.def(
      "dropout_mask(Tensor rng_state, float dropout_p, SymInt batch, SymInt heads, "
      "SymInt seqlen_q, SymInt seqlen_k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_cuda, CPU, library) {
  library.impl("dropout_mask", TORCH_BOX(&fa::api::dropout_mask));
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_cuda, CUDA, library) {
  library.impl("dropout_mask", TORCH_BOX(&fa::api::dropout_mask));
}
