// SPDX-License-Identifier: BSD-3-Clause
// Softcap, ALiBi, sinks and dropout: from tensors and numbers to the terms that kernels follow.
#pragma once

#include <optional>
#include <vector>

#include "api/tensors.h"

namespace fa::api {

struct TermArguments {
  const std::optional<Tensor>& alibi_slopes;  // (heads) or (batch, heads), as row statistics
  const std::optional<Tensor>& sinks;         // (heads), alike
  const std::optional<Tensor>& rng_state;     // (2) int64: seed and offset
  double softcap;                             // 0: none
  double dropout_p;                           // 0: none; else there is an rng_state
};

// Checks the arguments against the problem. copies: of arguments that are not read where they lie.
ScoreTerms check_terms(const TermArguments& arguments, const Argument& q, const Shape& shape,
                       std::vector<Tensor>& copies);

// A (batch, heads) or (heads) tensor as a number for each head.
HeadValues head_values(const Tensor& tensor);

void check_dropout_p(double dropout_p);

// Checks dtype and shape; the tensor itself, or a contiguous copy.
Tensor readable_rng_state(const Argument& rng_state);

}  // namespace fa::api
