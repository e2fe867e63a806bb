// SPDX-License-Identifier: BSD-3-Clause
// What the operators of both passes do (attention.cpp), which operators.cpp registers.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "api/tensors.h"

namespace fa::api {

// q (batch, seqlen_q, heads, head_dim), k (batch, seqlen_k, heads_kv, head_dim), v alike with a
// head_dim of its own -> out (batch, seqlen_q, heads, head_dim of v), softmax_lse (batch, heads,
// seqlen_q). The forward pass is deterministic in any case: autograd under torch.compile hands the
// argument on to the backward pass.
std::tuple<Tensor, Tensor> forward(const Tensor& q_tensor, const Tensor& k_tensor,
                                   const Tensor& v_tensor, std::optional<double> softmax_scale,
                                   int64_t window_left, int64_t window_right, bool deterministic,
                                   bool allow_tf32);

// dout and out like the result, dlse (gradient of softmax_lse) and softmax_lse (batch, heads,
// seqlen_q) -> dq, dk, dv.
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dout_tensor, const std::optional<Tensor>& dlse_tensor, const Tensor& q_tensor,
    const Tensor& k_tensor, const Tensor& v_tensor, const Tensor& out_tensor,
    const Tensor& lse_tensor, std::optional<double> softmax_scale, int64_t window_left,
    int64_t window_right, bool deterministic, bool allow_tf32);

// The same with sequences, rules and terms, and max_logit (heads), which has no elements where
// nobody wants it. Packed, q is (1, total_q, heads, head_dim) and so on.
std::tuple<Tensor, Tensor, Tensor> forward_general(
    const Tensor& q_tensor, const Tensor& k_tensor, const Tensor& v_tensor,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
    const std::optional<Tensor>& seqused_q, const std::optional<Tensor>& seqused_k,
    const std::optional<Tensor>& attn_bias, const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& key_padding_mask, const std::optional<Tensor>& block_mask,
    const std::optional<Tensor>& document_ids, const std::optional<Tensor>& prefix_lens,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& rng_state, double softcap, double dropout_p,
    std::optional<double> softmax_scale, int64_t window_left, int64_t window_right,
    bool deterministic, bool allow_tf32, bool needs_max_logit);

// -> dq, dk, dv, and the gradients of attn_bias, alibi_slopes and sinks, contiguous and like these,
// or without elements where nobody wants them.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_general(
    const Tensor& dout_tensor, const std::optional<Tensor>& dlse_tensor, const Tensor& q_tensor,
    const Tensor& k_tensor, const Tensor& v_tensor, const Tensor& out_tensor,
    const Tensor& lse_tensor, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& seqused_q,
    const std::optional<Tensor>& seqused_k, const std::optional<Tensor>& attn_bias,
    const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& key_padding_mask,
    const std::optional<Tensor>& block_mask, const std::optional<Tensor>& document_ids,
    const std::optional<Tensor>& prefix_lens, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& rng_state, double softcap,
    double dropout_p, std::optional<double> softmax_scale, int64_t window_left,
    int64_t window_right, bool deterministic, bool allow_tf32, bool needs_dbias, bool needs_dslopes,
    bool needs_dsinks);

}  // namespace fa::api
