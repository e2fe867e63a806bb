// SPDX-License-Identifier: BSD-3-Clause
// The operators of both passes.
#include "api/attention.h"

#define FA_GENERAL_SCHEMA                                                                \
  "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, "   \
  "Tensor? attn_bias, Tensor? attn_mask, Tensor? key_padding_mask, Tensor? block_mask, " \
  "Tensor? document_ids, Tensor? prefix_lens, Tensor? alibi_slopes, Tensor? sinks, "     \
  "Tensor? rng_state, float softcap, float dropout_p, "

#define FA_SCALE_SCHEMA                                                                 \
  "float? softmax_scale, SymInt window_left, SymInt window_right, bool deterministic, " \
  "bool allow_tf32"

#define FA_FWD_SCHEMA \
  "(Tensor q, Tensor k, Tensor v, " FA_SCALE_SCHEMA ") -> (Tensor out, Tensor softmax_lse)"

#define FA_FWD_GENERAL_SCHEMA                                         \
  "(Tensor q, Tensor k, Tensor v, " FA_GENERAL_SCHEMA FA_SCALE_SCHEMA \
  ", bool needs_max_logit) -> (Tensor out, Tensor softmax_lse, Tensor max_logit)"

#define FA_BWD_INPUTS \
  "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "

#define FA_BWD_SCHEMA FA_BWD_INPUTS FA_SCALE_SCHEMA ") -> (Tensor dq, Tensor dk, Tensor dv)"

#define FA_BWD_GENERAL_SCHEMA                                          \
  FA_BWD_INPUTS FA_GENERAL_SCHEMA FA_SCALE_SCHEMA                      \
      ", bool needs_dbias, bool needs_dslopes, bool needs_dsinks) -> " \
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dslopes, Tensor dsinks)"

// An operator and its eager twin are the same. Python gives the former an autograd formula, which
// tracing needs; eager calls have theirs outside the operators, and going around a formula takes
// them longer than calling an operator that has none. The plain operators are the general ones
// without what they would have to look at.
STABLE_TORCH_LIBRARY(flash_attn_cuda, library) {
  library.def("fwd" FA_FWD_SCHEMA);
  library.def("fwd_eager" FA_FWD_SCHEMA);
  library.def("bwd" FA_BWD_SCHEMA);
  library.def("bwd_eager" FA_BWD_SCHEMA);
  library.def("fwd_general" FA_FWD_GENERAL_SCHEMA);
  library.def("fwd_general_eager" FA_FWD_GENERAL_SCHEMA);
  library.def("bwd_general" FA_BWD_GENERAL_SCHEMA);
  library.def("bwd_general_eager" FA_BWD_GENERAL_SCHEMA);
}

#define FA_IMPLEMENT(library)                                              \
  library.impl("fwd", TORCH_BOX(&fa::api::forward));                       \
  library.impl("fwd_eager", TORCH_BOX(&fa::api::forward));                 \
  library.impl("bwd", TORCH_BOX(&fa::api::backward));                      \
  library.impl("bwd_eager", TORCH_BOX(&fa::api::backward));                \
  library.impl("fwd_general", TORCH_BOX(&fa::api::forward_general));       \
  library.impl("fwd_general_eager", TORCH_BOX(&fa::api::forward_general)); \
  library.impl("bwd_general", TORCH_BOX(&fa::api::backward_general));      \
  library.impl("bwd_general_eager", TORCH_BOX(&fa::api::backward_general));

STABLE_TORCH_LIBRARY_IMPL(flash_attn_cuda, CPU, library){FA_IMPLEMENT(library)}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_cuda, CUDA, library) {
  FA_IMPLEMENT(library)
}
