// SPDX-License-Identifier: BSD-3-Clause
// What operators do: check, choose a row, allocate, launch.
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <tuple>

#include "api/attention.h"
#include "api/launch.h"
#include "api/rules.h"
#include "api/sequences.h"
#include "api/terms.h"
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

// What both passes know of a problem beside its tensors.
struct Call {
  Shape shape;
  WindowMask window;
  double softmax_scale;
  bool allow_tf32;
  CleanSequences sequences = {};
  Rules rules = {};

  bool packed() const { return sequences.queries.cu_seqlens != nullptr; }
  // Whether there may be rows of no sequence, which kernels leave as they are.
  bool leaves_rows() const {
    return sequences.queries.seqused != nullptr || sequences.keys.seqused != nullptr;
  }

  // Packed sequences are all in one batch entry.
  template <typename View>
  View of_all(View view) const {
    if (packed()) {
      view.batch_stride = 0;
    }
    return view;
  }
};

// The default of all that the plain operators do not take.
Call plain_call(const Argument& q, const Argument& k, const Argument& v,
                std::optional<double> softmax_scale, int64_t window_left, int64_t window_right,
                bool allow_tf32) {
  const Shape shape = check_qkv(q, k, v);
  return {shape, check_window(shape, window_left, window_right),
          resolve_scale(softmax_scale, shape), allow_tf32};
}

Call general_call(const Argument& q, const Argument& k, const Argument& v,
                  const SequenceArguments& sequences, const RuleArguments& rules,
                  const TermArguments& terms, std::optional<double> softmax_scale,
                  int64_t window_left, int64_t window_right, bool allow_tf32) {
  Call call = plain_call(q, k, v, softmax_scale, window_left, window_right, allow_tf32);
  call.shape.batch = check_sequences(sequences, q, k);
  call.rules = check_rules(rules, q, call.shape, sequences.packed());
  call.rules.terms = check_terms(terms, q, call.shape, call.rules.copies);
  call.sequences = clean_sequences(sequences, q, k, call.shape);
  call.window = check_window(call.shape, window_left, window_right);
  return call;
}

// Which tiles of keys the rules leave to a tile of queries: memory that the returned tensor owns,
// if any is needed.
template <typename Params>
std::optional<Tensor> add_tile_map(Params& params, const Argument& q, const KernelConfig& config) {
  if (q.device.is_cpu() || !params.rules.has_data_masks()) {
    return std::nullopt;
  }
  const Shape& shape = params.shape;
  const int64_t query_tiles = params.queries.count_tiles(shape.batch, params.queries.packed_rows,
                                                         shape.seqlen_q, config.tile_m);
  const int key_tiles = ceil_div(shape.seqlen_k, config.tile_n);
  bool differs = false;
  for (const KeepMask& mask : params.rules.masks) {
    differs |= mask.head_stride != 0;
  }
  Tensor memory = scratch((differs ? shape.num_heads : 1) * query_tiles * key_tiles, q);
  params.tile_map = {static_cast<TileClass*>(memory.mutable_data_ptr()),
                     differs ? query_tiles * key_tiles : 0, key_tiles};
  return memory;
}

// The bits of a mask that has a byte for each pair, if the row reads them and they are no more than
// its bytes. Memory that the returned tensor owns.
template <typename Params>
std::optional<Tensor> add_pair_bits(Params& params, const Argument& q, const KernelConfig& config) {
  if (!config.reads_pair_bits()) {
    return std::nullopt;
  }
  params.pair_bits = pair_bits_of(params, config.tile_m, config.tile_n);
  if (params.pair_bits.count == 0) {
    return std::nullopt;
  }
  Tensor memory = scratch(params.pair_bits.bytes(), q);
  params.pair_bits.words = static_cast<uint32_t*>(memory.mutable_data_ptr());
  return memory;
}

// Gives the backward pass its workspace: memory that the returned tensor owns.
Tensor add_workspace(BwdParams& params, const Argument& q, const KernelConfig& config,
                     bool deterministic) {
  const Shape& shape = params.shape;
  if (q.device.is_cpu()) {
    Tensor delta =
        empty({q.sizes[0], shape.num_heads, q.sizes[1]}, q, statistics_dtype(config.dtype));
    params.delta = row_statistics(delta);
    if (params.queries.cu_seqlens != nullptr) {
      params.delta.batch_stride = 0;
    }
    return delta;
  }
  const int64_t tiles = params.queries.count_tiles(shape.batch, params.queries.packed_rows,
                                                   shape.seqlen_q, config.tile_m);
  Tensor memory = empty({BwdWorkspace::floats(tiles * shape.num_heads, config.tile_m,
                                              config.head_dim, deterministic)},
                        q, Dtype::kFloat32);
  params.workspace =
      BwdWorkspace::in(static_cast<float*>(memory.mutable_data_ptr()), shape.num_heads, tiles,
                       config.tile_m, config.head_dim, deterministic);
  return memory;
}

// Where gradients go beside those of q, k and v; null where nobody asks for one.
struct MoreGradients {
  ScoreTensor dbias;
  HeadValues dslopes;
  HeadValues dsinks;
};

// Gives the gradients of slopes and sinks what is asked for: memory of their partial sums, zeros,
// that the returned tensors own.
std::array<std::optional<Tensor>, 2> add_head_gradients(BwdParams& params, const Argument& q,
                                                        const KernelConfig& config,
                                                        const MoreGradients& more) {
  const Shape& shape = params.shape;
  const int64_t query_tiles = params.queries.count_tiles(shape.batch, params.queries.packed_rows,
                                                         shape.seqlen_q, config.tile_m);
  const int64_t key_tiles =
      params.keys.count_tiles(shape.batch, params.keys.packed_rows, shape.seqlen_k, config.tile_n);
  const auto give = [&](HeadGradient& gradient, const HeadValues& sums,
                        int64_t tiles) -> std::optional<Tensor> {
    if (sums.data == nullptr) {
      return std::nullopt;
    }
    Tensor memory = empty({shape.num_heads, tiles}, q, statistics_dtype(config.dtype));
    torch::stable::zero_(memory);
    gradient = {sums, memory.mutable_data_ptr(), tiles};
    return memory;
  };
  return {give(params.dslopes, more.dslopes, q.device.is_cpu() ? query_tiles : key_tiles),
          give(params.dsinks, more.dsinks, query_tiles)};
}

// A result of as many columns as kernels write.
Tensor empty_rows(const Argument& rows, const Argument& heads, const Argument& cols) {
  return empty({rows.sizes[0], rows.sizes[1], heads.sizes[2], kernel_head_dim(cols)}, rows,
               dtype_of(rows));
}

// A (batch, rows, heads, head_dim) result on CUDA, for fill_on_cuda().
LeftRows left_rows(const Tensor& result, const Sequences& sequences, const Call& call) {
  const int64_t row_bytes = result.size(2) * result.size(3) * bytes_of(dtype_of({"", result}));
  return {.sequences = sequences,
          .batch = call.shape.batch,
          .rows = static_cast<int>(result.size(1)),
          .planes = 1,
          .words_of_row = row_bytes / static_cast<int64_t>(sizeof(uint32_t)),
          .words = static_cast<uint32_t*>(result.mutable_data_ptr()),
          .value = 0};
}

// The same of softmax_lse, (batch, heads, rows), whose rows see no key.
LeftRows left_statistics(const Tensor& softmax_lse, const Call& call) {
  return {.sequences = call.sequences.queries,
          .batch = call.shape.batch,
          .rows = static_cast<int>(softmax_lse.size(2)),
          .planes = static_cast<int>(softmax_lse.size(1)),
          .words_of_row = 1,
          .words = static_cast<uint32_t*>(softmax_lse.mutable_data_ptr()),
          .value = std::bit_cast<uint32_t>(-std::numeric_limits<float>::infinity())};
}

// What kernels leave of their results as it was: out 0 and softmax_lse -inf; gradients 0.
void fill_left_rows(Tensor& out, Tensor& softmax_lse, const Argument& q, const Call& call) {
  if (!call.leaves_rows()) {
    return;
  }
  if (q.device.is_cpu()) {
    torch::stable::zero_(out);
    torch::stable::fill_(softmax_lse, -std::numeric_limits<double>::infinity());
  } else {
    fill_on_cuda({left_rows(out, call.sequences.queries, call), left_statistics(softmax_lse, call)},
                 q);
  }
}
void fill_left_rows(Tensor& dq, Tensor& dk, Tensor& dv, const Argument& q, const Call& call) {
  if (!call.leaves_rows()) {
    return;
  }
  if (q.device.is_cpu()) {
    for (Tensor* gradient : {&dq, &dk, &dv}) {
      torch::stable::zero_(*gradient);
    }
  } else {
    fill_on_cuda(
        {left_rows(dq, call.sequences.queries, call), left_rows(dk, call.sequences.keys, call),
         left_rows(dv, call.sequences.keys, call)},
        q);
  }
}

// max_logit: where the largest score of each head goes; null: nobody asks.
std::tuple<Tensor, Tensor> run_forward(const Argument& q, const Argument& k, const Argument& v,
                                       Call call, const HeadValues& max_logit) {
  call.rules.terms.max_logit = max_logit;
  const int row = select_row(
      problem_for(Pass::kForward, q, call.shape, call.window, call.rules, call.allow_tf32));
  const int head_dim_v = call.shape.head_dim_v;
  call.shape.head_dim = kernel_head_dim(q);
  call.shape.head_dim_v = kernel_head_dim(v);
  Tensor out = empty_rows(q, q, v);
  Tensor softmax_lse =
      empty({q.sizes[0], q.sizes[2], q.sizes[1]}, q, statistics_dtype(dtype_of(q)));
  fill_left_rows(out, softmax_lse, q, call);
  if (softmax_lse.numel() > 0 && call.shape.batch > 0) {
    const Tensor q_readable = readable(q);
    const Tensor k_readable = readable(k);
    const Tensor v_readable = readable(v);
    FwdParams params{.shape = call.shape,
                     .window = call.window,
                     .softmax_scale = call.softmax_scale,
                     .q = call.of_all(view(q_readable)),
                     .k = call.of_all(view(k_readable)),
                     .v = call.of_all(view(v_readable)),
                     .out = call.of_all(view(out)),
                     .softmax_lse = call.of_all(row_statistics(softmax_lse)),
                     .queries = call.sequences.queries,
                     .keys = call.sequences.keys,
                     .rules = call.rules};
    const std::optional<Tensor> tile_map = add_tile_map(params, q, table::kRows[row]);
    const std::optional<Tensor> pair_bits = add_pair_bits(params, q, table::kRows[row]);
    launch(params, q, row);
  }
  return {without_padding(out, head_dim_v), softmax_lse};
}

std::tuple<Tensor, Tensor, Tensor> run_backward(const Argument& dout,
                                                const std::optional<Tensor>& dlse_tensor,
                                                const Argument& q, const Argument& k,
                                                const Argument& v, const Argument& out,
                                                const Argument& softmax_lse, Call call,
                                                bool deterministic, const MoreGradients& more) {
  const bool has_dlse = dlse_tensor.has_value();  // softmax_lse stands in for a dlse that is not
  const Argument dlse{"dlse", has_dlse ? *dlse_tensor : softmax_lse.tensor};
  check_like_out(dout, q, v);
  check_like_out(out, q, v);
  check_row_statistics(softmax_lse, q);
  check_row_statistics(dlse, q);
  const int row = select_row(
      problem_for(Pass::kBackward, q, call.shape, call.window, call.rules, call.allow_tf32));
  const auto [head_dim, head_dim_v] = std::pair(call.shape.head_dim, call.shape.head_dim_v);
  call.shape.head_dim = kernel_head_dim(q);
  call.shape.head_dim_v = kernel_head_dim(v);
  Tensor dq = empty_rows(q, q, q);
  Tensor dk = empty_rows(k, k, q);
  Tensor dv = empty_rows(k, k, v);
  fill_left_rows(dq, dk, dv, q, call);
  if ((dq.numel() > 0 || dk.numel() > 0) && call.shape.batch > 0) {
    const Tensor q_readable = readable(q);
    const Tensor k_readable = readable(k);
    const Tensor v_readable = readable(v);
    const Tensor out_readable = readable(out);
    const Tensor dout_readable = readable(dout);
    const Tensor lse_readable = make_contiguous(softmax_lse);
    const Tensor dlse_readable = make_contiguous(dlse);
    BwdParams params{.shape = call.shape,
                     .window = call.window,
                     .softmax_scale = call.softmax_scale,
                     .q = call.of_all(view(q_readable)),
                     .k = call.of_all(view(k_readable)),
                     .v = call.of_all(view(v_readable)),
                     .out = call.of_all(view(out_readable)),
                     .dout = call.of_all(view(dout_readable)),
                     .dq = call.of_all(view(dq)),
                     .dk = call.of_all(view(dk)),
                     .dv = call.of_all(view(dv)),
                     .softmax_lse = call.of_all(row_statistics(lse_readable)),
                     .queries = call.sequences.queries,
                     .keys = call.sequences.keys,
                     .rules = call.rules,
                     .dbias = more.dbias};
    if (has_dlse) {
      params.dlse = call.of_all(row_statistics(dlse_readable));
    }
    const Tensor workspace = add_workspace(params, q, table::kRows[row], deterministic);
    const auto [of_slopes, of_sinks] = add_head_gradients(params, q, table::kRows[row], more);
    const std::optional<Tensor> tile_map = add_tile_map(params, q, table::kRows[row]);
    const std::optional<Tensor> pair_bits = add_pair_bits(params, q, table::kRows[row]);
    launch(params, q, row);
  }
  return {without_padding(dq, head_dim), without_padding(dk, head_dim),
          without_padding(dv, head_dim_v)};
}

}  // namespace

std::tuple<Tensor, Tensor> forward(const Tensor& q_tensor, const Tensor& k_tensor,
                                   const Tensor& v_tensor, std::optional<double> softmax_scale,
                                   int64_t window_left, int64_t window_right,
                                   bool /*deterministic*/, bool allow_tf32) {
  const Argument q{"q", q_tensor};
  const Argument k{"k", k_tensor};
  const Argument v{"v", v_tensor};
  return run_forward(q, k, v,
                     plain_call(q, k, v, softmax_scale, window_left, window_right, allow_tf32), {});
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dout_tensor, const std::optional<Tensor>& dlse_tensor, const Tensor& q_tensor,
    const Tensor& k_tensor, const Tensor& v_tensor, const Tensor& out_tensor,
    const Tensor& lse_tensor, std::optional<double> softmax_scale, int64_t window_left,
    int64_t window_right, bool deterministic, bool allow_tf32) {
  const Argument dout{"dout", dout_tensor};
  const Argument q{"q", q_tensor};
  const Argument k{"k", k_tensor};
  const Argument v{"v", v_tensor};
  const Argument out{"out", out_tensor};
  const Argument softmax_lse{"softmax_lse", lse_tensor};
  return run_backward(dout, dlse_tensor, q, k, v, out, softmax_lse,
                      plain_call(q, k, v, softmax_scale, window_left, window_right, allow_tf32),
                      deterministic, {});
}

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
    bool /*deterministic*/, bool allow_tf32, bool needs_max_logit) {
  const Argument q{"q", q_tensor};
  const Argument k{"k", k_tensor};
  const Argument v{"v", v_tensor};
  const Call call =
      general_call(q, k, v, {cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k},
                   {attn_bias, attn_mask, key_padding_mask, block_mask, document_ids, prefix_lens},
                   {alibi_slopes, sinks, rng_state, softcap, dropout_p}, softmax_scale, window_left,
                   window_right, allow_tf32);
  Tensor max_logit =
      empty({needs_max_logit ? call.shape.num_heads : 0}, q, statistics_dtype(dtype_of(q)));
  HeadValues of_heads;
  if (max_logit.numel() > 0) {
    torch::stable::fill_(max_logit, -std::numeric_limits<double>::infinity());
    of_heads = head_values(max_logit);
  }
  auto [out, softmax_lse] = run_forward(q, k, v, call, of_heads);
  return {out, softmax_lse, max_logit};
}

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
    bool needs_dsinks) {
  const Argument dout{"dout", dout_tensor};
  const Argument q{"q", q_tensor};
  const Argument k{"k", k_tensor};
  const Argument v{"v", v_tensor};
  const Argument out{"out", out_tensor};
  const Argument softmax_lse{"softmax_lse", lse_tensor};
  const Call call =
      general_call(q, k, v, {cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k},
                   {attn_bias, attn_mask, key_padding_mask, block_mask, document_ids, prefix_lens},
                   {alibi_slopes, sinks, rng_state, softcap, dropout_p}, softmax_scale, window_left,
                   window_right, allow_tf32);
  const auto gradient = [&q](const char* name, const std::optional<Tensor>& tensor, bool needed) {
    return needed && tensor.has_value() ? zeros_like({name, *tensor}) : empty({0}, q, dtype_of(q));
  };
  const Tensor dbias = gradient("attn_bias", attn_bias, needs_dbias);
  const Tensor dslopes = gradient("alibi_slopes", alibi_slopes, needs_dslopes);
  const Tensor dsinks = gradient("sinks", sinks, needs_dsinks);
  MoreGradients more;
  if (dbias.numel() > 0) {
    more.dbias = score_tensor(dbias, four_sizes({"attn_bias", dbias}));
  }
  if (dslopes.numel() > 0) {
    more.dslopes = head_values(dslopes);
  }
  if (dsinks.numel() > 0) {
    more.dsinks = head_values(dsinks);
  }
  auto [dq, dk, dv] =
      run_backward(dout, dlse_tensor, q, k, v, out, softmax_lse, call, deterministic, more);
  return {dq, dk, dv, dbias, dslopes, dsinks};
}

}  // namespace fa::api
