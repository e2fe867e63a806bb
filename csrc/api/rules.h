// SPDX-License-Identifier: BSD-3-Clause
// Bias, masks, documents and prefixes: from tensors to the rules that kernels follow.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "api/tensors.h"

namespace fa::api {

struct RuleArguments {
  const std::optional<Tensor>& attn_bias;         // broadcastable to (batch, heads, sq, sk)
  const std::optional<Tensor>& attn_mask;         // the same, bool
  const std::optional<Tensor>& key_padding_mask;  // (batch, sk) bool
  const std::optional<Tensor>& block_mask;  // broadcastable to (batch, heads, blocks, blocks), bool
  const std::optional<Tensor>& document_ids;  // (batch, seqlen) int32
  const std::optional<Tensor>& prefix_lens;   // (batch) int32
};

struct Rules : ScoreRules {
  std::vector<Tensor> copies;  // of arguments that cannot be read where they lie
};

// Queries and keys of a square of a block mask.
inline constexpr int kBlockMaskLog2 = 7;

// Checks the arguments against the problem. Of packed sequences the sizes of biases and masks tell
// how long they may be, and the shape's lengths are cut down to that.
Rules check_rules(const RuleArguments& arguments, const Argument& q, Shape& shape, bool packed);

// The sizes of a bias, with ones in front of those that it has.
std::array<int64_t, 4> four_sizes(const Argument& argument);

// A contiguous tensor with those sizes as what is broadcast to the scores.
ScoreTensor score_tensor(const Tensor& tensor, const std::array<int64_t, 4>& sizes);

}  // namespace fa::api
