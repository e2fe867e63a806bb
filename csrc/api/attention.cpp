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

// Gives the backward pass its workspace: memory that the returned tensor owns.
Tensor add_workspace(BwdParams& params, const Argument& q, const KernelConfig& config,
                     bool deterministic) {
  const Shape& shape = params.shape;
  if (q.device.is_cpu()) {
    Tensor delta =
        empty({shape.batch, shape.num_heads, shape.seqlen_q}, q, statistics_dtype(config.dtype));
    params.delta = row_statistics(delta);
    return delta;
  }
  const int64_t tiles =
      params.queries.count_tiles(shape.batch, shape.seqlen_q, shape.seqlen_q, config.tile_m);
  Tensor memory = empty({BwdWorkspace::floats(tiles * shape.num_heads, config.tile_m,
                                              config.head_dim, deterministic)},
                        q, Dtype::kFloat32);
  params.workspace =
      BwdWorkspace::in(static_cast<float*>(memory.mutable_data_ptr()), shape.num_heads, tiles,
                       config.tile_m, config.head_dim, deterministic);
  return memory;
}

}  // namespace

// q (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, heads_kv, head_dim)
// -> out like q, softmax_lse (batch, heads, seqlen_q). The forward pass is deterministic in any
// case: autograd under torch.compile hands the argument on to the backward pass.
std::tuple<Tensor, Tensor> forward(const Tensor& q_tensor, const Tensor& k_tensor,
                                   const Tensor& v_tensor, std::optional<double> softmax_scale,
                                   int64_t window_left, int64_t window_right,
                                   bool /*deterministic*/) {
  const Argument q{"q", q_tensor};
  const Argument k{"k", k_tensor};
  const Argument v{"v", v_tensor};
  Shape shape = check_qkv(q, k, v);
  const WindowMask window = check_window(shape, window_left, window_right);
  const double scale = resolve_scale(softmax_scale, shape);
  const int row = select_row(problem_for(Pass::kForward, q, shape, window));

  const int head_dim = shape.head_dim;
  shape.head_dim = kernel_head_dim(q);
  const Dtype dtype = dtype_of(q);
  const Tensor out =
      empty({shape.batch, shape.seqlen_q, shape.num_heads, shape.head_dim}, q, dtype);
  const Tensor softmax_lse =
      empty({shape.batch, shape.num_heads, shape.seqlen_q}, q, statistics_dtype(dtype));
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
                     .softmax_lse = row_statistics(softmax_lse)},
           q, row);
  }
  return {without_padding(out, head_dim), softmax_lse};
}

// dout and out like q, dlse (gradient of softmax_lse) and softmax_lse (batch, heads, seqlen_q) ->
// dq, dk, dv.
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dout_tensor, const std::optional<Tensor>& dlse_tensor, const Tensor& q_tensor,
    const Tensor& k_tensor, const Tensor& v_tensor, const Tensor& out_tensor,
    const Tensor& lse_tensor, std::optional<double> softmax_scale, int64_t window_left,
    int64_t window_right, bool deterministic) {
  const Argument dout{"dout", dout_tensor};
  const Argument q{"q", q_tensor};
  const Argument k{"k", k_tensor};
  const Argument v{"v", v_tensor};
  const Argument out{"out", out_tensor};
  const Argument softmax_lse{"softmax_lse", lse_tensor};
  const bool has_dlse = dlse_tensor.has_value();  // softmax_lse stands in for a dlse that is not
  const Argument dlse{"dlse", has_dlse ? *dlse_tensor : lse_tensor};
  Shape shape = check_qkv(q, k, v);
  const WindowMask window = check_window(shape, window_left, window_right);
  const double scale = resolve_scale(softmax_scale, shape);
  check_like(dout, q);
  check_like(out, q);
  check_row_statistics(softmax_lse, shape, q);
  check_row_statistics(dlse, shape, q);
  const int row = select_row(problem_for(Pass::kBackward, q, shape, window));

  const int head_dim = shape.head_dim;
  shape.head_dim = kernel_head_dim(q);
  const Dtype dtype = dtype_of(q);
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
    const Tensor dlse_readable = make_contiguous(dlse);
    BwdParams params{.shape = shape,
                     .window = window,
                     .softmax_scale = scale,
                     .q = view(q_readable),
                     .k = view(k_readable),
                     .v = view(v_readable),
                     .out = view(out_readable),
                     .dout = view(dout_readable),
                     .dq = view(dq),
                     .dk = view(dk),
                     .dv = view(dv),
                     .softmax_lse = row_statistics(lse_readable)};
    if (has_dlse) {
      params.dlse = row_statistics(dlse_readable);
    }
    const Tensor workspace = add_workspace(params, q, table::kRows[row], deterministic);
    launch(params, q, row);
  }
  return {without_padding(dq, head_dim), without_padding(dk, head_dim),
          without_padding(dv, head_dim)};
}

}  // namespace fa::api

#define FA_FWD_SCHEMA                                                                              \
  "(Tensor q, Tensor k, Tensor v, float? softmax_scale, SymInt window_left, SymInt window_right, " \
  "bool deterministic) -> (Tensor out, Tensor softmax_lse)"

#define FA_BWD_SCHEMA                                                                          \
  "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, " \
  "float? softmax_scale, SymInt window_left, SymInt window_right, bool deterministic) "        \
  "-> (Tensor dq, Tensor dk, Tensor dv)"

// fwd and fwd_eager are the same, and so are bwd and bwd_eager. Python gives fwd and bwd autograd
// formulas, which tracing needs; eager calls have theirs outside the operators, and going around a
// formula takes them longer than calling an operator that has none.
STABLE_TORCH_LIBRARY(flash_attn_cuda, library) {
  library.def("fwd" FA_FWD_SCHEMA);
  library.def("fwd_eager" FA_FWD_SCHEMA);
  library.def("bwd" FA_BWD_SCHEMA);
  library.def("bwd_eager" FA_BWD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_cuda, CPU, library) {
  library.impl("fwd", TORCH_BOX(&fa::api::forward));
  library.impl("fwd_eager", TORCH_BOX(&fa::api::forward));
  library.impl("bwd", TORCH_BOX(&fa::api::backward));
  library.impl("bwd_eager", TORCH_BOX(&fa::api::backward));
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_cuda, CUDA, library) {
  library.impl("fwd", TORCH_BOX(&fa::api::forward));
  library.impl("fwd_eager", TORCH_BOX(&fa::api::forward));
  library.impl("bwd", TORCH_BOX(&fa::api::backward));
  library.impl("bwd_eager", TORCH_BOX(&fa::api::backward));
}
