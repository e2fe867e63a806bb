// SPDX-License-Identifier: BSD-3-Clause
// Packed sequences, and lengths within a batch: from the tensors that tell of them to what kernels
// may trust.
#pragma once

#include <optional>

#include "api/tensors.h"

namespace fa::api {

struct SequenceArguments {
  const std::optional<Tensor>& cu_seqlens_q;  // (batch + 1) int32; with it q is packed
  const std::optional<Tensor>& cu_seqlens_k;  // and so are k and v
  const std::optional<Tensor>& seqused_q;     // (batch) int32
  const std::optional<Tensor>& seqused_k;

  bool packed() const { return cu_seqlens_q.has_value(); }
  // Whether there may be rows of no sequence.
  bool any() const { return packed() || seqused_q.has_value() || seqused_k.has_value(); }
};

struct CleanSequences {
  Sequences queries;
  Sequences keys;
  Tensor memory;  // that they point to
};

// The batch that the arguments tell of, for q and k of four dimensions, (1, total, heads, head_dim)
// where they are packed. Checks shapes, dtypes and devices.
int check_sequences(const SequenceArguments& arguments, const Argument& q, const Argument& k);

// shape: of the problem, with seqlen_q and seqlen_k as the longest that count. On the CPU, and on
// CUDA where FLASH_ATTN_CUDA_VALIDATE=1 asks for it, what the tensors hold is checked, and rules
// must have room for the longest sequence; elsewhere it is made harmless without being looked at
// from the host. On the CPU the shape is then that of the longest.
CleanSequences clean_sequences(const SequenceArguments& arguments, const Argument& q,
                               const Argument& k, Shape& shape);

// Whether the host looks at what tensors of integers hold.
bool checks_contents(const Argument& q);

// The same tensor, or its copy on the CPU, to look at.
Tensor on_host(const Argument& argument);

}  // namespace fa::api
