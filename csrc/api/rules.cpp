// SPDX-License-Identifier: BSD-3-Clause
#include "api/rules.h"

#include <algorithm>

#include "api/sequences.h"
#include "common/check.h"
#include "common/math.h"

namespace fa::api {
namespace {

constexpr size_t kScoreDims = 4;  // batch, heads, queries, keys

// What sizes a tensor may have: 1 or these. Of the rows and columns of packed sequences any.
struct Extent {
  std::array<int64_t, kScoreDims> sizes;
  bool any_rows;
};

std::ostream& operator<<(std::ostream& stream, const Extent& extent) {
  stream << "(" << extent.sizes[0] << ", " << extent.sizes[1] << ", ";
  return extent.any_rows ? stream << "longest q, longest k)"
                         : stream << extent.sizes[2] << ", " << extent.sizes[3] << ")";
}

ScoreTensor broadcast(const Argument& argument, const Extent& extent) {
  const size_t dims = argument.sizes.size();
  bool fits = dims <= kScoreDims;
  std::array<int64_t, kScoreDims> strides = {};
  for (size_t i = 0; fits && i < dims; ++i) {
    const size_t dim = kScoreDims - dims + i;
    const int64_t size = argument.sizes[i];
    const bool is_free = extent.any_rows && dim >= 2;
    fits = size == 1 || is_free || size == extent.sizes[dim];
    strides[dim] = size == 1 ? 0 : argument.strides[i];
  }
  check(fits, ErrorKind::kValue, argument.name, ": expected a shape that broadcasts to ", extent,
        ", got ", ShapeOf{argument.sizes});
  return {argument.tensor.data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

void check_bool(const Argument& argument, const Argument& q) {
  check(argument.scalar_type == torch::headeronly::ScalarType::Bool, ErrorKind::kType,
        argument.name, ": expected bool, True where a key is seen, got ",
        torch::headeronly::toString(argument.scalar_type));
  check_device(argument, q);
}

void check_bias(const Argument& bias, const Argument& q) {
  const Dtype dtype = dtype_of(bias);
  check(dtype != Dtype::kFloat64 || dtype_of(q) == Dtype::kFloat64, ErrorKind::kType, bias.name,
        ": expected float32, bfloat16 or float16 for q of ", name_of(dtype_of(q)), ", got float64");
  check_device(bias, q);
}

// Rows and columns that a tensor of these sizes has room for.
void limit_lengths(const Argument& argument, int block_log2, Shape& shape) {
  const std::array<int64_t, kScoreDims> sizes = four_sizes(argument);
  const auto limit = [block_log2](int seqlen, int64_t size) {
    return size == 1 ? seqlen : static_cast<int>(std::min(int64_t{seqlen}, size << block_log2));
  };
  shape.seqlen_q = limit(shape.seqlen_q, sizes[2]);
  shape.seqlen_k = limit(shape.seqlen_k, sizes[3]);
}

class Reader {
 public:
  Reader(const Argument& q, Shape& shape, bool packed) : q_(q), shape_(shape), packed_(packed) {}

  void bias(const std::optional<Tensor>& tensor, Rules& rules) const {
    if (tensor.has_value()) {
      const Argument bias{"attn_bias", *tensor};
      check_bias(bias, q_);
      rules.bias = broadcast(bias, extent(0));
      rules.bias_dtype = dtype_of(bias);
      limit(bias, 0);
    }
  }

  void mask(const char* name, const std::optional<Tensor>& tensor, int block_log2, Rules& rules) {
    if (tensor.has_value()) {
      const Argument mask{name, *tensor};
      check_bool(mask, q_);
      add({broadcast(mask, extent(block_log2)), block_log2}, rules);
      limit(mask, block_log2);
    }
  }

  void key_padding(const std::optional<Tensor>& tensor, Rules& rules) {
    if (tensor.has_value()) {
      const Argument mask{"key_padding_mask", *tensor};
      check_dense(mask);
      check_bool(mask, q_);
      check_shape(mask, {shape_.batch, shape_.seqlen_k});
      add({{tensor->data_ptr(), mask.strides[0], 0, 0, mask.strides[1]}, 0}, rules);
    }
  }

  void documents(const std::optional<Tensor>& tensor, Rules& rules) const {
    if (tensor.has_value()) {
      const Argument ids{"document_ids", *tensor};
      check_dense(ids);
      check(shape_.seqlen_q == shape_.seqlen_k, ErrorKind::kValue,
            "document_ids: expected as many queries as keys, got ", shape_.seqlen_q, " and ",
            shape_.seqlen_k);
      check_integers(ids, {shape_.batch, shape_.seqlen_q}, q_);
      rules.copies.push_back(make_contiguous(ids));
      rules.document_ids = static_cast<const int32_t*>(rules.copies.back().const_data_ptr());
      rules.document_stride = shape_.seqlen_q;
    }
  }

  void prefixes(const std::optional<Tensor>& tensor, Rules& rules) const {
    if (tensor.has_value()) {
      const Argument lengths{"prefix_lens", *tensor};
      check_integers(lengths, {shape_.batch}, q_);
      rules.copies.push_back(make_contiguous(lengths));
      rules.prefix_lens = static_cast<const int32_t*>(rules.copies.back().const_data_ptr());
      if (checks_contents(q_)) {
        const Tensor values = on_host({lengths.name, rules.copies.back()});
        for (int i = 0; i < shape_.batch; ++i) {
          const int32_t value = static_cast<const int32_t*>(values.const_data_ptr())[i];
          check(value >= 0, ErrorKind::kValue, "prefix_lens: expected 0 or more keys, got ", value,
                " at index ", i);
        }
      }
    }
  }

 private:
  Extent extent(int block_log2) const {
    const int block = 1 << block_log2;
    return {{shape_.batch, shape_.num_heads, ceil_div(shape_.seqlen_q, block),
             ceil_div(shape_.seqlen_k, block)},
            packed_};
  }

  void limit(const Argument& argument, int block_log2) const {
    if (packed_) {
      limit_lengths(argument, block_log2, shape_);
    }
  }

  void add(const KeepMask& mask, Rules& rules) { rules.masks[masks_++] = mask; }

  void check_dense(const Argument& argument) const {
    check(!packed_, ErrorKind::kValue, argument.name,
          ": expected None for packed sequences, which cu_seqlens divide");
  }

  const Argument& q_;
  Shape& shape_;
  bool packed_;
  int masks_ = 0;
};

}  // namespace

std::array<int64_t, 4> four_sizes(const Argument& argument) {
  std::array<int64_t, kScoreDims> sizes = {1, 1, 1, 1};
  std::copy_backward(argument.sizes.begin(), argument.sizes.end(), sizes.end());
  return sizes;
}

ScoreTensor score_tensor(const Tensor& tensor, const std::array<int64_t, 4>& sizes) {
  std::array<int64_t, kScoreDims> strides = {};
  int64_t stride = 1;
  for (size_t dim = kScoreDims; dim-- > 0;) {
    strides[dim] = sizes[dim] == 1 ? 0 : stride;
    stride *= sizes[dim];
  }
  return {tensor.data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

Rules check_rules(const RuleArguments& arguments, const Argument& q, Shape& shape, bool packed) {
  Rules rules;
  Reader read(q, shape, packed);
  read.bias(arguments.attn_bias, rules);
  read.mask("attn_mask", arguments.attn_mask, 0, rules);
  read.key_padding(arguments.key_padding_mask, rules);
  read.mask("block_mask", arguments.block_mask, kBlockMaskLog2, rules);
  read.documents(arguments.document_ids, rules);
  read.prefixes(arguments.prefix_lens, rules);
  return rules;
}

}  // namespace fa::api
