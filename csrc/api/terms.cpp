// SPDX-License-Identifier: BSD-3-Clause
#include "api/terms.h"

#include <cmath>
#include <limits>

#include "common/check.h"

namespace fa::api {
namespace {

using torch::headeronly::ScalarType;

void check_numbers(const Argument& argument, const Argument& q) {
  const Dtype expected = statistics_dtype(dtype_of(q));
  const Dtype dtype = dtype_of(argument);
  check(dtype == expected, ErrorKind::kType, argument.name, ": expected ", name_of(expected),
        " for q of ", name_of(dtype_of(q)), ", got ", name_of(dtype));
  check_device(argument, q);
}

HeadValues check_slopes(const Argument& slopes, const Argument& q, const Shape& shape) {
  const size_t dims = slopes.sizes.size();
  const bool fits = (dims == 1 || (dims == 2 && slopes.sizes[0] == shape.batch)) &&
                    slopes.sizes[dims - 1] == shape.num_heads;
  check(fits, ErrorKind::kValue, slopes.name, ": expected shape (", shape.num_heads, ",) or (",
        shape.batch, ", ", shape.num_heads, "), got ", ShapeOf{slopes.sizes});
  check_numbers(slopes, q);
  return head_values(slopes.tensor);
}

HeadValues check_sinks(const Argument& sinks, const Argument& q, const Shape& shape) {
  check_shape(sinks, {shape.num_heads});
  check_numbers(sinks, q);
  return head_values(sinks.tensor);
}

double check_softcap(double softcap) {
  const auto as_float = static_cast<float>(softcap);
  const bool fits =
      softcap == 0 || (std::isfinite(as_float) && as_float >= std::numeric_limits<float>::min());
  check(fits, ErrorKind::kValue,
        "softcap: expected 0 (none) or a positive number within float32, got ", softcap);
  return softcap;
}

Dropout check_dropout(double dropout_p, const std::optional<Tensor>& rng_state, const Argument& q,
                      std::vector<Tensor>& copies) {
  check_dropout_p(dropout_p);
  if (dropout_p == 0) {
    return {};
  }
  check(rng_state.has_value(), ErrorKind::kValue,
        "rng_state: expected an int64 tensor of shape (2,), seed and offset, where dropout_p is ",
        dropout_p, ", got None");
  const Argument state{"rng_state", *rng_state};
  check_device(state, q);
  copies.push_back(readable_rng_state(state));
  return Dropout::of(dropout_p, static_cast<const int64_t*>(copies.back().const_data_ptr()));
}

}  // namespace

void check_dropout_p(double dropout_p) {
  check(dropout_p >= 0 && dropout_p <= 1, ErrorKind::kValue,
        "dropout_p: expected a probability from 0 to 1, got ", dropout_p);
}

Tensor readable_rng_state(const Argument& rng_state) {
  check(rng_state.scalar_type == ScalarType::Long, ErrorKind::kType, rng_state.name,
        ": expected int64, got ", torch::headeronly::toString(rng_state.scalar_type));
  check_shape(rng_state, {2});
  return make_contiguous(rng_state);
}

HeadValues head_values(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {tensor.data_ptr(), strides.size() == 2 ? strides[0] : 0, strides[strides.size() - 1]};
}

ScoreTerms check_terms(const TermArguments& arguments, const Argument& q, const Shape& shape,
                       std::vector<Tensor>& copies) {
  ScoreTerms terms;
  terms.softcap = check_softcap(arguments.softcap);
  if (arguments.alibi_slopes.has_value()) {
    terms.alibi = check_slopes({"alibi_slopes", *arguments.alibi_slopes}, q, shape);
  }
  if (arguments.sinks.has_value()) {
    terms.sinks = check_sinks({"sinks", *arguments.sinks}, q, shape);
  }
  terms.dropout = check_dropout(arguments.dropout_p, arguments.rng_state, q, copies);
  return terms;
}

}  // namespace fa::api
