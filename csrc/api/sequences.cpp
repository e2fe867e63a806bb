// SPDX-License-Identifier: BSD-3-Clause
#include "api/sequences.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "api/launch.h"
#include "common/check.h"
#include "common/clean_sequences.h"

namespace fa::api {
namespace {

// One side's arguments: what they are called, and the tensor whose rows they divide.
struct Side {
  const char* cu_seqlens_name;
  const char* seqused_name;
  std::optional<Tensor> cu_seqlens;
  std::optional<Tensor> seqused;
  const Argument& rows;

  void make_contiguous() {
    for (std::optional<Tensor>* tensor : {&cu_seqlens, &seqused}) {
      if (tensor->has_value()) {
        *tensor = api::make_contiguous({seqused_name, **tensor});
      }
    }
  }
};

Side side_of_queries(const SequenceArguments& arguments, const Argument& q) {
  return {"cu_seqlens_q", arguments.packed() ? "seqused_q" : "seqlens_q", arguments.cu_seqlens_q,
          arguments.seqused_q, q};
}

Side side_of_keys(const SequenceArguments& arguments, const Argument& k) {
  return {"cu_seqlens_k", arguments.packed() ? "seqused_k" : "seqlens_k", arguments.cu_seqlens_k,
          arguments.seqused_k, k};
}

const int32_t* integers(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

void check_contents(const Side& side, int batch, int longest) {
  const int64_t rows = side.rows.sizes[1];
  std::optional<Tensor> cu_seqlens;
  if (side.cu_seqlens.has_value()) {
    cu_seqlens = on_host({side.cu_seqlens_name, *side.cu_seqlens});
    int64_t before = 0;
    for (int i = 0; i <= batch; ++i) {
      const int64_t first_row = integers(*cu_seqlens)[i];
      check(before <= first_row && first_row <= rows, ErrorKind::kValue, side.cu_seqlens_name,
            ": expected first rows that never decrease, from 0 or more to at most the ", rows,
            " rows of ", side.rows.name, ", got ", first_row, " after ", before, " at index ", i);
      before = first_row;
    }
  }
  std::optional<Tensor> seqused;
  if (side.seqused.has_value()) {
    seqused = on_host({side.seqused_name, *side.seqused});
  }
  for (int i = 0; i < batch; ++i) {
    int64_t length =
        cu_seqlens.has_value() ? integers(*cu_seqlens)[i + 1] - integers(*cu_seqlens)[i] : rows;
    if (seqused.has_value()) {
      const int64_t used = integers(*seqused)[i];
      check(0 <= used && used <= length, ErrorKind::kValue, side.seqused_name,
            ": expected from 0 to the ", length, " rows of sequence ", i, ", got ", used);
      length = used;
    }
    check(length <= longest, ErrorKind::kValue,
          "attn_bias, attn_mask, block_mask: expected room for the ", length, " rows of sequence ",
          i, " of ", side.rows.name, ", got room for ", longest);
  }
}

GivenSequences given(const Side& side, int batch, int longest, int32_t*& memory) {
  GivenSequences given = {};
  given.batch = batch;
  given.rows = static_cast<int>(side.rows.sizes[1]);
  given.longest = longest;
  if (side.cu_seqlens.has_value()) {
    given.cu_seqlens = integers(*side.cu_seqlens);
    given.clean_cu_seqlens = memory;
    memory += batch + 1;
  }
  if (side.seqused.has_value()) {
    given.seqused = integers(*side.seqused);
  }
  given.clean_seqused = memory;
  memory += batch;
  return given;
}

Sequences trusted(const GivenSequences& given) {
  return {given.clean_cu_seqlens, given.clean_seqused,
          given.clean_cu_seqlens == nullptr ? 0 : given.rows};
}

int longest_of(const GivenSequences& given) {
  int longest = 0;
  for (int i = 0; i < given.batch; ++i) {
    longest = std::max(longest, given.clean_seqused[i]);
  }
  return longest;
}

}  // namespace

bool checks_contents(const Argument& q) {
  const char* asked = std::getenv("FLASH_ATTN_CUDA_VALIDATE");
  return q.device.is_cpu() || (asked != nullptr && std::string_view(asked) == "1");
}

Tensor on_host(const Argument& argument) {
  return argument.device.is_cpu()
             ? argument.tensor
             : torch::stable::to(argument.tensor,
                                 torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

int check_sequences(const SequenceArguments& arguments, const Argument& q, const Argument& k) {
  check(arguments.cu_seqlens_q.has_value() == arguments.cu_seqlens_k.has_value(), ErrorKind::kValue,
        "cu_seqlens_q, cu_seqlens_k: expected both or neither");
  int64_t batch = q.sizes[0];
  if (arguments.packed()) {
    const Argument cu_seqlens_q{"cu_seqlens_q", *arguments.cu_seqlens_q};
    check(cu_seqlens_q.sizes.size() == 1 && cu_seqlens_q.sizes[0] >= 1, ErrorKind::kValue,
          "cu_seqlens_q: expected shape (batch + 1,), got ", ShapeOf{cu_seqlens_q.sizes});
    batch = cu_seqlens_q.sizes[0] - 1;
  }
  for (const Side& side : {side_of_queries(arguments, q), side_of_keys(arguments, k)}) {
    if (side.cu_seqlens.has_value()) {
      check_integers({side.cu_seqlens_name, *side.cu_seqlens}, {batch + 1}, q);
    }
    if (side.seqused.has_value()) {
      check_integers({side.seqused_name, *side.seqused}, {batch}, q);
    }
  }
  return static_cast<int>(batch);
}

CleanSequences clean_sequences(const SequenceArguments& arguments, const Argument& q,
                               const Argument& k, Shape& shape) {
  CleanSequences clean;
  if (!arguments.any()) {
    return clean;
  }
  Side of_queries = side_of_queries(arguments, q);
  Side of_keys = side_of_keys(arguments, k);
  of_queries.make_contiguous();
  of_keys.make_contiguous();
  if (checks_contents(q)) {
    check_contents(of_queries, shape.batch, shape.seqlen_q);
    check_contents(of_keys, shape.batch, shape.seqlen_k);
  }
  clean.memory = scratch((4 * int64_t{shape.batch} + 2) * sizeof(int32_t), q);
  auto* memory = static_cast<int32_t*>(clean.memory.mutable_data_ptr());
  const GivenSequences queries = given(of_queries, shape.batch, shape.seqlen_q, memory);
  const GivenSequences keys = given(of_keys, shape.batch, shape.seqlen_k, memory);
  if (q.device.is_cpu()) {
    fa::clean_sequences(queries);
    fa::clean_sequences(keys);
    shape.seqlen_q = longest_of(queries);
    shape.seqlen_k = longest_of(keys);
  } else {
    clean_on_cuda(queries, keys, q);
  }
  clean.queries = trusted(queries);
  clean.keys = trusted(keys);
  return clean;
}

}  // namespace fa::api
