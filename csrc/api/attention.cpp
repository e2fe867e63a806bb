// SPDX-License-Identifier: BSD-3-Clause
// The two operators: check, choose a row, allocate, launch.
#include <cmath>
#include <tuple>

#include "api/launch.h"
#include "api/tensors.h"
#include "common/check.h"

namespace fa::api {
namespace {

// The default is head_dim ** -0.5.
double resolve_scale(std::optional<double> softmax_scale, const Shape& shape) {
  const double scale = softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(shape.head_dim)));
  check(std::isfinite(static_cast<float>(scale)), ErrorKind::kValue,
        "softmax_scale: expected a finite number within float32, got ", scale);
  return scale;
}

}  // namespace

// q (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, heads_kv, head_dim)
// -> out like q, softmax_lse (batch, heads, seqlen_q).
std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v,
                                   std::optional<double> softmax_scale, int64_t window_left,
                                   int64_t window_right) {
  Shape shape = check_qkv(q, k, v);
  const WindowMask window = check_window(shape, window_left, window_right);
  const double scale = resolve_scale(softmax_scale, shape);
  const int row = select_row(problem_for(Pass::kForward, q, shape, window));

  const int head_dim = shape.head_dim;
  shape.head_dim = kernel_head_dim(q, head_dim);
  Tensor out =
      empty({shape.batch, shape.seqlen_q, shape.num_heads, shape.head_dim}, q, q.scalar_type());
  Tensor softmax_lse = empty({shape.batch, shape.num_heads, shape.seqlen_q}, q,
                             statistics_dtype(table::kRows[row].dtype));
  if (softmax_lse.numel() > 0) {
    const Tensor q_readable = readable(q);
    const Tensor k_readable = readable(k);
    const Tensor v_readable = readable(v);
    launch(FwdParams{.shape = shape,
                     .window = window,
                     .softmax_scale = scale,
                     .q = view(q_readable),
                     .k = view(k_readable),
                     .v = view(v_readable),
                     .out = view(out),
                     .softmax_lse = softmax_lse.mutable_data_ptr()},
           q, row);
  }
  return {without_padding(out, head_dim), softmax_lse};
}

// dout and out like q, dlse (gradient of softmax_lse) and softmax_lse (batch, heads, seqlen_q) ->
// dq, dk, dv.
std::tuple<Tensor, Tensor, Tensor> backward(Tensor dout, std::optional<Tensor> dlse, Tensor q,
                                            Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
                                            std::optional<double> softmax_scale,
                                            int64_t window_left, int64_t window_right) {
  Shape shape = check_qkv(q, k, v);
  const WindowMask window = check_window(shape, window_left, window_right);
  const double scale = resolve_scale(softmax_scale, shape);
  check_like({"dout", dout}, {"q", q});
  check_like({"out", out}, {"q", q});
  check_row_statistics({"softmax_lse", softmax_lse}, shape, q);
  if (dlse.has_value()) {
    check_row_statistics({"dlse", *dlse}, shape, q);
  }
  const int row = select_row(problem_for(Pass::kBackward, q, shape, window));

  const int head_dim = shape.head_dim;
  shape.head_dim = kernel_head_dim(q, head_dim);
  const auto dtype = q.scalar_type();
  const auto row_dtype = statistics_dtype(table::kRows[row].dtype);
  Tensor dq = empty({shape.batch, shape.seqlen_q, shape.num_heads, shape.head_dim}, q, dtype);
  Tensor dk = empty({shape.batch, shape.seqlen_k, shape.num_heads_kv, shape.head_dim}, q, dtype);
  Tensor dv = empty({shape.batch, shape.seqlen_k, shape.num_heads_kv, shape.head_dim}, q, dtype);
  if (dq.numel() > 0 || dk.numel() > 0) {
    const Tensor q_readable = readable(q);
    const Tensor k_readable = readable(k);
    const Tensor v_readable = readable(v);
    const Tensor out_readable = readable(out);
    const Tensor dout_readable = readable(dout);
    const Tensor lse_readable = make_contiguous(softmax_lse);
    const Tensor dlse_readable = dlse.has_value() ? make_contiguous(*dlse) : lse_readable;
    const Tensor delta = empty({shape.batch, shape.num_heads, shape.seqlen_q}, q, row_dtype);
    launch(BwdParams{.shape = shape,
                     .window = window,
                     .softmax_scale = scale,
                     .q = view(q_readable),
                     .k = view(k_readable),
                     .v = view(v_readable),
                     .out = view(out_readable),
                     .dout = view(dout_readable),
                     .softmax_lse = lse_readable.const_data_ptr(),
                     .dlse = dlse.has_value() ? dlse_readable.const_data_ptr() : nullptr,
                     .delta = delta.mutable_data_ptr(),
                     .dq = view(dq),
                     .dk = view(dk),
                     .dv = view(dv)},
           q, row);
  }
  return {without_padding(dq, head_dim), without_padding(dk, head_dim),
          without_padding(dv, head_dim)};
}

}  // namespace fa::api

STABLE_TORCH_LIBRARY(flash_attn_cuda, library) {
  library.def(
      "fwd(Tensor q, Tensor k, Tensor v, float? softmax_scale, SymInt window_left, SymInt "
      "window_right) "
      "-> (Tensor out, Tensor softmax_lse)");
  library.def(
      "bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
      "softmax_lse, "
      "float? softmax_scale, SymInt window_left, SymInt window_right) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_cuda, CPU, library) {
  library.impl("fwd", TORCH_BOX(&fa::api::forward));
  library.impl("bwd", TORCH_BOX(&fa::api::backward));
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_cuda, CUDA, library) {
  library.impl("fwd", TORCH_BOX(&fa::api::forward));
  library.impl("bwd", TORCH_BOX(&fa::api::backward));
}
