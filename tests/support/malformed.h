// SPDX-License-Identifier: BSD-3-Clause
// Attention problems whose first rows, lengths, documents, prefixes and mask bytes hold anything at
// all, with memory as api/ makes it: an array for each, not a byte longer than its last element.
// Rows of no sequence and the bias of pairs that are not seen hold NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/clean_sequences.h"
#include "common/math.h"
#include "common/params.h"
#include "tests/support/cpu_problem.h"

namespace fa::test {

// What a family of kernels may be given.
struct MalformedLimits {
  std::vector<Dtype> dtypes;
  std::vector<Dtype> bias_dtypes;
  std::vector<int> head_dims;
  std::vector<Layout> layouts;
  int longest;         // rows of a tensor
  int64_t most_pairs;  // of queries and keys, in all heads
};

class Draw {
 public:
  explicit Draw(int number) : random_(number) {}

  int below(int count) { return static_cast<int>(random_() % static_cast<uint32_t>(count)); }
  bool once_in(int count) { return below(count) == 0; }
  // Small ones more often than large ones.
  int at_most(int most) { return below(below(most + 1) + 1); }
  template <typename T>
  T one_of(const std::vector<T>& values) {
    return values[below(static_cast<int>(values.size()))];
  }

  int32_t anything(int usual) {
    using Limits = std::numeric_limits<int32_t>;
    switch (below(6)) {
      case 0:
        return Limits::min() + below(2);
      case 1:
        return Limits::max() - below(2);
      case 2:
        return static_cast<int32_t>(random_());
      case 3:
        return -below(usual + 2);
      case 4:
        return usual + below(usual + 2);
      default:
        return below(usual + 1);
    }
  }

  // Good values: as they are, some or all replaced, backwards, or past the end.
  std::vector<int32_t> spoil(std::vector<int32_t> values, int usual) {
    const int way = below(6);
    const int shift = below(usual + 2);
    for (int32_t& value : values) {
      if (way == 1 || (way == 2 && once_in(3))) {
        value = anything(usual);
      } else if (way == 3) {
        value += shift;
      }
    }
    if (way == 4) {
      std::reverse(values.begin(), values.end());
    } else if (way == 5 && !values.empty()) {
      values[below(static_cast<int>(values.size()))] = anything(usual);
    }
    return values;
  }

 private:
  std::mt19937 random_;
};

// Axes and sizes of a bias or a mask.
struct ScoreSizes {
  int axes = kAbsent;
  int queries = 1;
  int keys = 1;
  int block_log2 = 0;
  bool transposed = false;
  int alignment = 1;

  bool present() const { return axes != kAbsent; }
  ScoreArray array(int element_bytes, const Shape& shape) const {
    return {element_bytes, axes, shape.batch, shape.num_heads,
            queries,       keys, transposed,  alignment};
  }
  // No sequence may be longer than there is room for; one row or column stands for any number.
  void limit(Shape& shape) const {
    const auto limited = [this](int seqlen, int size) {
      return size == 1 ? seqlen : min(seqlen, size << block_log2);
    };
    shape.seqlen_q = limited(shape.seqlen_q, queries);
    shape.seqlen_k = limited(shape.seqlen_k, keys);
  }
  std::string describe() const {
    return present() ? concat(axes, " of ", queries, "x", keys, transposed ? " transposed" : "")
                     : "none";
  }
};

// The queries or the keys: how many rows there are, and what the caller says of them.
struct MalformedSide {
  int rows = 0;  // of the packed tensor, or of each batch entry
  std::vector<int32_t> cu_seqlens = {};
  std::vector<int32_t> seqused = {};

  std::string describe() const { return concat(rows, Lengths{cu_seqlens, seqused}.describe()); }
};

struct MalformedCase {
  MalformedCase(int number, const MalformedLimits& limits) : number(number) {
    Draw draw(number);
    dtype = draw.one_of(limits.dtypes);
    draw_shape(draw, limits);
    packed = draw.once_in(2);
    const bool has_used = draw.once_in(2);
    draw_side(draw, has_used && !draw.once_in(3), queries);
    draw_side(draw, has_used && !draw.once_in(3), keys);
    left = draw.once_in(2) ? -1 : draw.at_most(queries.rows + 2);
    right = draw.once_in(3) ? -1 : draw.once_in(2) ? 0 : draw.at_most(keys.rows + 2);
    layout = draw.one_of(limits.layouts);
    has_dlse = draw.once_in(2);
    bias_dtype = draw.one_of(limits.bias_dtypes);
    if (!draw.once_in(3)) {  // else plain rows may run it
      draw_rules(draw);
    }
  }

  // As the API tells it: no sequence is longer than the rules have room for.
  Shape limited_shape() const {
    Shape limited = shape;
    if (packed) {
      for (const ScoreSizes& sizes : {bias, mask, padding, blocks}) {
        sizes.limit(limited);
      }
    }
    return limited;
  }
  bool has_sequences() const { return packed || !queries.seqused.empty() || !keys.seqused.empty(); }
  std::string describe() const {
    return concat(name_of(dtype), " batch ", shape.batch, " heads ", shape.num_heads, "/",
                  shape.num_heads_kv, " head_dim ", shape.head_dim, "/", shape.head_dim_v,
                  " queries ", queries.describe(), " keys ", keys.describe(), " window ", left, ",",
                  right, " layout ", static_cast<int>(layout), " bias ", bias.describe(), " mask ",
                  mask.describe(), " padding ", padding.describe(), " blocks ", blocks.describe(),
                  " documents ", documents.size(), " prefixes ", prefix_lens.size());
  }

  int number;
  Dtype dtype;
  Shape shape;  // of the tensors: all rows
  bool packed;
  MalformedSide queries;
  MalformedSide keys;
  int left;
  int right;
  Layout layout;
  bool has_dlse;
  Dtype bias_dtype;
  ScoreSizes bias;
  ScoreSizes mask;
  ScoreSizes padding;
  ScoreSizes blocks;
  std::vector<int32_t> documents;
  std::vector<int32_t> prefix_lens;

 private:
  static constexpr int kBlockLog2 = 7;

  void draw_shape(Draw& draw, const MalformedLimits& limits) {
    const bool is_large_batch = draw.once_in(100);  // more than a block of threads
    shape.batch = is_large_batch ? 1000 + draw.below(100) : 1 + draw.below(5);
    shape.num_heads_kv = is_large_batch ? 1 : 1 + draw.below(4);
    shape.num_heads = shape.num_heads_kv * (is_large_batch ? 1 : 1 + draw.below(3));
    shape.head_dim = draw.one_of(limits.head_dims);
    shape.head_dim_v = draw.once_in(2) ? shape.head_dim : draw.one_of(limits.head_dims);
    shape.seqlen_q = draw.at_most(limits.longest);
    shape.seqlen_k = draw.once_in(2) ? shape.seqlen_q : draw.at_most(limits.longest);
    while (int64_t{shape.batch} * shape.num_heads * shape.seqlen_q * shape.seqlen_k >
           limits.most_pairs) {
      shape.seqlen_q = shape.seqlen_q * 3 / 4;
      shape.seqlen_k = shape.seqlen_k * 3 / 4;
    }
    queries.rows = shape.seqlen_q;
    keys.rows = shape.seqlen_k;
  }

  void draw_side(Draw& draw, bool has_used, MalformedSide& side) {
    std::vector<int32_t> first_rows(shape.batch + 1);
    std::vector<int32_t> lengths(shape.batch);
    for (int32_t& row : first_rows) {
      row = draw.below(side.rows + 1);
    }
    std::sort(first_rows.begin(), first_rows.end());
    for (int b = 0; b < shape.batch; ++b) {
      lengths[b] = draw.below((packed ? first_rows[b + 1] - first_rows[b] : side.rows) + 1);
    }
    if (packed) {
      side.cu_seqlens = draw.spoil(first_rows, side.rows);
    }
    if (has_used) {
      side.seqused = draw.spoil(lengths, side.rows);
    }
  }

  ScoreSizes draw_sizes(Draw& draw, int axes, int block_log2) const {
    const auto room = [&](int axis, int rows) {
      if ((axes & axis) == 0) {
        return 1;
      }
      const int size = (rows + (1 << block_log2) - 1) >> block_log2;
      return !packed || draw.once_in(2) ? size : draw.at_most(size + 2);
    };
    return {axes,
            room(kQueryAxis, queries.rows),
            room(kKeyAxis, keys.rows),
            block_log2,
            draw.once_in(3),
            draw.once_in(2) ? 8 : 1};
  }

  void draw_rules(Draw& draw) {
    const auto axes = [&draw] { return draw.below(kAllAxes + 1); };
    if (draw.once_in(2)) {
      bias = draw_sizes(draw, axes(), 0);
    }
    if (draw.once_in(3)) {
      mask = draw_sizes(draw, axes(), 0);
    }
    if (draw.once_in(3)) {
      blocks = draw_sizes(draw, axes(), kBlockLog2);
    }
    if (!packed && draw.once_in(4)) {
      padding = draw_sizes(draw, kBatchAxis | kKeyAxis, 0);
    }
    if (!packed && queries.rows == keys.rows && !draw.once_in(3)) {
      draw_documents(draw);
    }
    if (draw.once_in(3)) {
      for (int b = 0; b < shape.batch; ++b) {
        prefix_lens.push_back(draw.anything(keys.rows));
      }
    }
  }

  // One after another, or ids that fall and come back.
  void draw_documents(Draw& draw) {
    const int ids = 1 + draw.below(4);
    const int length = 1 + draw.at_most(100);
    const bool is_noise = draw.once_in(3);
    std::vector<int32_t> names;
    for (int id = 0; id < ids; ++id) {
      names.push_back(draw.anything(ids));
    }
    for (int row = 0; row < shape.batch * queries.rows; ++row) {
      documents.push_back(names[is_noise ? draw.below(ids) : row / length % ids]);
    }
  }
};

// Where kernels of the host find an array.
struct HostMemory {
  template <typename T>
  T* place(std::vector<T>& array) {
    return array.empty() ? nullptr : array.data();
  }
};

// The queries or the keys of a problem, and what cleaning makes of them.
struct CleanSide {
  // longest: rows of a sequence past this many do not count.
  CleanSide(const MalformedSide& side, int batch, int longest)
      : side(side),
        batch(batch),
        longest(longest),
        clean_cu_seqlens(side.cu_seqlens.size()),
        clean_seqused(batch) {
    forget();
  }

  // What cleaning wrote.
  void forget() {
    std::fill(clean_cu_seqlens.begin(), clean_cu_seqlens.end(), -1);
    std::fill(clean_seqused.begin(), clean_seqused.end(), -1);
  }

  template <typename Memory>
  GivenSequences given(Memory& memory) {
    return {.cu_seqlens = memory.place(side.cu_seqlens),
            .seqused = memory.place(side.seqused),
            .batch = batch,
            .rows = side.rows,
            .longest = longest,
            .clean_cu_seqlens = memory.place(clean_cu_seqlens),
            .clean_seqused = memory.place(clean_seqused)};
  }
  template <typename Memory>
  Sequences trusted(Memory& memory) {
    return {memory.place(clean_cu_seqlens), memory.place(clean_seqused),
            clean_cu_seqlens.empty() ? 0 : side.rows};
  }
  int longest_of_all() const {
    return *std::max_element(clean_seqused.begin(), clean_seqused.end());
  }

  MalformedSide side;
  int batch;
  int longest;
  std::vector<int32_t> clean_cu_seqlens;
  std::vector<int32_t> clean_seqused;
};

// Tensors and rules of a case, on the host. Memory: where kernels find them.
class MalformedProblem {
 public:
  explicit MalformedProblem(const MalformedCase& c)
      : c(c),
        shape(c.limited_shape()),
        queries(c.queries, shape.batch, shape.seqlen_q),
        keys(c.keys, shape.batch, shape.seqlen_k),
        clean_queries(cleaned(queries)),
        clean_keys(cleaned(keys)),
        is_query_(rows_that_count(clean_queries)),
        is_key_(rows_that_count(clean_keys)),
        q(tensor(c.queries, c.layout, shape.num_heads, shape.head_dim)),
        k(tensor(c.keys, c.layout, shape.num_heads_kv, shape.head_dim)),
        v(tensor(c.keys, c.layout, shape.num_heads_kv, shape.head_dim_v)),
        dout(tensor(c.queries, c.layout, shape.num_heads, shape.head_dim_v)),
        out(tensor(c.queries, Layout::kContiguous, shape.num_heads, shape.head_dim_v)),
        dq(tensor(c.queries, Layout::kContiguous, shape.num_heads, shape.head_dim)),
        dk(tensor(c.keys, Layout::kContiguous, shape.num_heads_kv, shape.head_dim)),
        dv(tensor(c.keys, Layout::kContiguous, shape.num_heads_kv, shape.head_dim_v)),
        lse(statistics_bytes(), kPoison),
        dlse(lse),
        delta(lse),
        bias(c.bias.array(size_of(c.bias_dtype), shape)),
        dbias(bias),
        masks{c.mask.array(1, shape), c.padding.array(1, shape), c.blocks.array(1, shape)},
        documents(c.documents),
        prefix_lens(c.prefix_lens) {
    fill_tensors();
    Draw draw(c.number);
    for (ScoreArray& mask : masks) {
      fill_mask(draw, mask);
    }
    fill_bias();
  }
  MalformedProblem(const MalformedProblem&) = delete;

  template <typename Memory>
  FwdParams forward(Memory& memory, const Shape& told) {
    FwdParams params = {.shape = told,
                        .window = {told.seqlen_q, told.seqlen_k, c.left, c.right},
                        .softmax_scale = softmax_scale(),
                        .q = view(memory, q),
                        .k = view(memory, k),
                        .v = view(memory, v),
                        .out = view(memory, out),
                        .softmax_lse = statistics(memory, lse),
                        .rules = rules(memory)};
    trust_sequences(memory, params);
    return params;
  }

  // But for the workspace of a family.
  template <typename Memory>
  BwdParams backward(Memory& memory, const Shape& told) {
    BwdParams params = {.shape = told,
                        .window = {told.seqlen_q, told.seqlen_k, c.left, c.right},
                        .softmax_scale = softmax_scale(),
                        .q = view(memory, q),
                        .k = view(memory, k),
                        .v = view(memory, v),
                        .out = view(memory, out),
                        .dout = view(memory, dout),
                        .dq = view(memory, dq),
                        .dk = view(memory, dk),
                        .dv = view(memory, dv),
                        .softmax_lse = statistics(memory, lse),
                        .dlse = c.has_dlse ? statistics(memory, dlse) : RowStatistics{},
                        .delta = {},
                        .workspace = {},
                        .rules = rules(memory),
                        .dbias = score_tensor(memory, dbias)};
    trust_sequences(memory, params);
    return params;
  }

  template <typename Memory>
  RowStatistics statistics(Memory& memory, std::vector<unsigned char>& values) const {
    const int64_t rows = c.queries.rows;
    return {memory.place(values), c.packed ? 0 : shape.num_heads * rows, rows};
  }

  // What the API gives the backward pass; 0 where dbias has elements.
  void clear_gradients() {
    for (Tensor* gradient : {&dq, &dk, &dv}) {
      std::fill(gradient->bytes.begin(), gradient->bytes.end(), kPoison);
    }
    const size_t size = size_of(c.bias_dtype);
    dbias.for_each([&](int b, int h, int i, int j) {
      std::fill_n(dbias.bytes.begin() + dbias.index(b, h, i, j) * size, size, 0);
    });
  }

  // Rows that count hold numbers, all others what they held before.
  void check_forward() {
    check_rows("out", out, is_query_);
    check_statistics("softmax_lse", lse);
  }
  void check_backward() {
    check_rows("dq", dq, is_query_);
    check_rows("dk", dk, is_key_);
    check_rows("dv", dv, is_key_);
    const size_t size = size_of(c.bias_dtype);
    std::vector<unsigned char> gaps = dbias.bytes;
    dbias.for_each([&](int b, int h, int i, int j) {
      const int64_t first = dbias.index(b, h, i, j) * size;
      if (!std::isfinite(read(c.bias_dtype, dbias.bytes.data() + first))) {
        fail("dbias[", b, ",", h, ",", i, ",", j, "] is no number");
      }
      std::fill_n(gaps.begin() + first, size, kPoison);
    });
    require(std::all_of(gaps.begin(), gaps.end(), [](int byte) { return byte == kPoison; }),
            "dbias was written outside its elements");
  }
  void check_statistics(const std::string& name, std::vector<unsigned char>& values) {
    const Dtype dtype = statistics_dtype();
    for (size_t index = 0; index * size_of(dtype) < values.size(); ++index) {
      const size_t entry = index / (shape.num_heads * c.queries.rows);
      const size_t row = index % c.queries.rows;
      const double value = read(dtype, values.data() + index * size_of(dtype));
      const bool counts = is_query_[entry * c.queries.rows + row];
      if (counts ? !(value < kInfinity) : !std::isnan(value)) {
        fail(name, " of row ", row, counts ? " is " : ", which is in no sequence, became ", value);
      }
    }
  }

  Dtype statistics_dtype() const {
    return c.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  }

  const MalformedCase& c;
  const Shape shape;  // with lengths as sequences are at most
  CleanSide queries;  // what kernels are given is to be cleaned
  CleanSide keys;
  const CleanSide clean_queries;
  const CleanSide clean_keys;

 private:
  std::vector<bool> is_query_;  // by batch entry of the tensor, and row
  std::vector<bool> is_key_;

 public:
  Tensor q, k, v, dout, out, dq, dk, dv;
  std::vector<unsigned char> lse, dlse, delta;
  ScoreArray bias, dbias;
  ScoreArray masks[3];
  std::vector<int32_t> documents;
  std::vector<int32_t> prefix_lens;

 private:
  static CleanSide cleaned(CleanSide side) {
    HostMemory memory;
    clean_sequences(side.given(memory));
    return side;
  }

  double softmax_scale() const { return 1 / std::sqrt(shape.head_dim); }
  int tensor_batch() const { return c.packed ? 1 : shape.batch; }
  int64_t statistics_bytes() const {
    return int64_t{tensor_batch()} * shape.num_heads * c.queries.rows * size_of(statistics_dtype());
  }
  Tensor tensor(const MalformedSide& side, Layout layout, int heads, int head_dim) const {
    return Tensor(c.dtype, tensor_batch(), side.rows, heads, head_dim, layout, c.packed);
  }

  std::vector<bool> rows_that_count(const CleanSide& side) const {
    std::vector<bool> counts(tensor_batch() * side.side.rows, false);
    for (int b = 0; b < shape.batch; ++b) {
      const int begin = c.packed ? side.clean_cu_seqlens[b] : b * side.side.rows;
      const int length = side.clean_seqused[b];
      require(0 <= begin && 0 <= length && length <= static_cast<int>(counts.size()) - begin,
              concat("a clean sequence has ", length, " rows from row ", begin, " on"));
      std::fill_n(counts.begin() + begin, length, true);
    }
    return counts;
  }

  void fill_tensors() {
    std::mt19937 random(c.number);
    const auto is_query = [this](int b, int row) { return is_query_[b * c.queries.rows + row]; };
    const auto is_key = [this](int b, int row) { return is_key_[b * c.keys.rows + row]; };
    q.randomize(random, 1, is_query);
    dout.randomize(random, 1, is_query);
    k.randomize(random, 1, is_key);
    v.randomize(random, 1, is_key);
    std::uniform_real_distribution<double> uniform(-1, 1);
    const size_t size = size_of(statistics_dtype());
    for (size_t index = 0; index * size < dlse.size(); ++index) {
      const size_t entry = index / (shape.num_heads * c.queries.rows);
      if (is_query_[entry * c.queries.rows + index % c.queries.rows]) {
        write(statistics_dtype(), dlse.data() + index * size, uniform(random));
      }
    }
  }

  // Any bytes, 0 in some squares, or all the same.
  static void fill_mask(Draw& draw, ScoreArray& mask) {
    const int way = draw.below(4);
    const int byte = draw.below(256);
    mask.for_each([&](int b, int h, int i, int j) {
      const bool hides = way == 1 ? (i / 64 + j / 64 + h + b) % 3 == 0 : draw.once_in(4);
      mask.bytes[mask.index(b, h, i, j)] = way == 0 ? byte : hides ? 0 : draw.below(256);
    });
  }

  void fill_bias() {
    HostMemory memory;
    const ScoreRules all = rules(memory);
    Draw draw(c.number);
    for (int b = 0; c.bias.present() && b < shape.batch; ++b) {
      const WindowMask window = {clean_queries.clean_seqused[b], clean_keys.clean_seqused[b],
                                 c.left, c.right};
      for (int h = 0; h < shape.num_heads; ++h) {
        const Visibility visibility(all, window, b, h);
        for (int i = 0; i < window.seqlen_q(); ++i) {
          for (int j = 0; j < window.seqlen_k(); ++j) {
            if (visibility.allows(i, j)) {
              write(c.bias_dtype,
                    bias.bytes.data() + bias.index(b, h, i, j) * size_of(c.bias_dtype),
                    draw.once_in(16) ? -kInfinity : draw.below(100) / 50.0 - 1);
            }
          }
        }
      }
    }
  }

  template <typename Memory>
  TensorView view(Memory& memory, Tensor& tensor) const {
    TensorView view = tensor.view;
    auto* data = static_cast<unsigned char*>(view.data);
    view.data =
        tensor.bytes.empty() ? nullptr : memory.place(tensor.bytes) + (data - tensor.bytes.data());
    return view;
  }

  template <typename Memory>
  static ScoreTensor score_tensor(Memory& memory, ScoreArray& array) {
    ScoreTensor tensor = array.tensor();
    tensor.data = memory.place(array.bytes);
    return tensor;
  }

  template <typename Memory>
  ScoreRules rules(Memory& memory) {
    ScoreRules rules;
    rules.bias = score_tensor(memory, bias);
    rules.bias_dtype = c.bias_dtype;
    int given = 0;
    for (ScoreArray& mask : masks) {
      if (!mask.bytes.empty()) {
        rules.masks[given++] = {score_tensor(memory, mask),
                                &mask == &masks[2] ? c.blocks.block_log2 : 0};
      }
    }
    rules.document_ids = memory.place(documents);
    rules.document_stride = c.queries.rows;
    rules.prefix_lens = memory.place(prefix_lens);
    return rules;
  }

  template <typename Memory, typename Params>
  void trust_sequences(Memory& memory, Params& params) {
    if (c.has_sequences()) {
      params.queries = queries.trusted(memory);
      params.keys = keys.trusted(memory);
    }
  }

  void check_rows(const std::string& name, const Tensor& result, const std::vector<bool>& counts) {
    const int rows = static_cast<int>(counts.size()) / tensor_batch();
    result.for_each([&](int b, int row, int h, int x) {
      const double value = result.at(b, row, h, x);
      const bool is_in_sequence = counts[b * rows + row];
      if (is_in_sequence ? !std::isfinite(value) : !result.untouched(b, row, h, x)) {
        fail(name, "[", b, ",", row, ",", h, ",", x, "]",
             is_in_sequence ? " is " : ", which is in no sequence, became ", value);
      }
    });
  }

  // Text is made only where it is needed: elements are many.
  template <typename... Parts>
  [[noreturn]] static void fail(const Parts&... sentence) {
    throw std::runtime_error(concat(sentence...));
  }
};

}  // namespace fa::test
