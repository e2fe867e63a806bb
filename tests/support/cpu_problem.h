// SPDX-License-Identifier: BSD-3-Clause
// An attention problem for the CPU kernels: random inputs, and outputs full of NaN, in tensors of
// any dtype and layout whose gaps hold NaN too. So does a bias where no pair sees it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/check.h"
#include "dispatch/registry.h"

namespace fa::test {

inline constexpr double kInfinity = HUGE_VAL;
inline constexpr unsigned char kPoison = 0xff;  // four dtypes read NaN where all bytes are this

inline void require(bool condition, const std::string& what) {
  if (!condition) {
    throw std::runtime_error(what);
  }
}

inline size_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Half the distance from 1 to the next number: the error of one rounding.
inline double half_ulp(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return 0x1p-53;
    case Dtype::kFloat32:
      return 0x1p-24;
    case Dtype::kFloat16:
      return 0x1p-11;
    case Dtype::kBFloat16:
      return 0x1p-8;
  }
  return 0;
}

inline double read(Dtype dtype, const void* source) {
  if (dtype == Dtype::kFloat64) {
    double value;
    std::memcpy(&value, source, 8);
    return value;
  }
  float value;
  if (dtype == Dtype::kFloat32) {
    std::memcpy(&value, source, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, source, 2);
  if (dtype == Dtype::kBFloat16) {
    const uint32_t bits = uint32_t{half} << 16;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const int exponent = half >> 10 & 31;
  const int mantissa = half & 1023;
  const double magnitude = exponent == 31 ? (mantissa ? NAN : kInfinity)
                           : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                          : std::ldexp(mantissa, -24);
  return half >> 15 ? -magnitude : magnitude;
}

// Values of the tests are normal numbers of their dtype, zero or infinite, so truncation is all it
// takes.
inline void write(Dtype dtype, void* target, double number) {
  const float value = static_cast<float>(number);
  if (dtype == Dtype::kFloat64) {
    std::memcpy(target, &number, 8);
  } else if (dtype == Dtype::kFloat32) {
    std::memcpy(target, &value, 4);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t half = magnitude < 113u << 23    ? 0
                          : magnitude == 255u << 23 ? 31u << 10
                                                    : (magnitude - (112u << 23)) >> 13;
    const uint16_t stored = dtype == Dtype::kBFloat16 ? bits >> 16 : (bits >> 16 & 0x8000) | half;
    std::memcpy(target, &stored, 2);
  }
}

enum class Layout { kContiguous, kHeadsFirst, kPadded };

// A (batch, seqlen, heads, head_dim) tensor, its memory not a byte longer than its last element.
class Tensor {
 public:
  Tensor(Dtype dtype, int batch, int seqlen, int heads, int head_dim, Layout layout, bool packed)
      : dtype_(dtype), batch_(batch), seqlen_(seqlen), heads_(heads), head_dim_(head_dim) {
    const int64_t gap = layout == Layout::kPadded ? 3 : 0;
    const int64_t row = head_dim + gap;
    view = {nullptr, row * heads * seqlen + gap, row * heads, row};
    if (layout == Layout::kHeadsFirst) {
      view = {nullptr, row * heads * seqlen, row, row * seqlen};
    }
    first_ = gap;  // so that rows are not even aligned to vectors at the start
    const bool empty = batch == 0 || seqlen == 0 || heads == 0;
    const int64_t count =
        empty ? 0 : first_ + view.offset(batch - 1, seqlen - 1, heads - 1) + head_dim;
    bytes.assign(count * size_of(dtype), kPoison);
    view.data = bytes.data() + (empty ? 0 : first_ * size_of(dtype));
    view.batch_stride = packed ? 0 : view.batch_stride;
  }
  Tensor(const Tensor&) = delete;

  double at(int batch, int row, int head, int column) const {
    return read(dtype_, address(batch, row, head, column));
  }
  void set(int batch, int row, int head, int column, double value) {
    write(dtype_, address(batch, row, head, column), value);
  }

  template <typename Visitor>
  void for_each(Visitor visit) const {
    for (int batch = 0; batch < batch_; ++batch) {
      for (int row = 0; row < seqlen_; ++row) {
        for (int head = 0; head < heads_; ++head) {
          for (int column = 0; column < head_dim_; ++column) {
            visit(batch, row, head, column);
          }
        }
      }
    }
  }

  // Random numbers in the rows for which exists(batch, row).
  template <typename Exists>
  void randomize(std::mt19937& random, double size, const Exists& exists) {
    std::uniform_real_distribution<double> uniform(-size, size);
    for_each([&](int b, int r, int h, int c) {
      if (exists(b, r)) {
        set(b, r, h, c, uniform(random));
      }
    });
  }

  // No kernel has written this element.
  bool untouched(int batch, int row, int head, int column) const {
    const unsigned char* element = address(batch, row, head, column);
    return std::all_of(element, element + size_of(dtype_),
                       [](int byte) { return byte == kPoison; });
  }

  // Memory that belongs to no element is as it was.
  void require_untouched_gaps(const std::string& name) const {
    std::vector<unsigned char> copy = bytes;
    for_each([&](int b, int r, int h, int c) {
      std::memset(copy.data() + (address(b, r, h, c) - bytes.data()), kPoison, size_of(dtype_));
    });
    require(std::all_of(copy.begin(), copy.end(), [](int byte) { return byte == kPoison; }),
            name + " was written outside its elements");
  }

  std::vector<unsigned char> bytes;
  TensorView view;

 private:
  unsigned char* address(int batch, int row, int head, int column) const {
    return static_cast<unsigned char*>(view.data) +
           (view.offset(batch, row, head) + column) * size_of(dtype_);
  }

  Dtype dtype_;
  int batch_, seqlen_, heads_, head_dim_;
  int64_t first_;
};

// Of queries or of keys. Without members all sequences are as long as the shape says.
struct Lengths {
  std::vector<int32_t> cu_seqlens = {};
  std::vector<int32_t> seqused = {};
  int foreign_rows = 0;  // of a packed tensor, after the last sequence

  bool packed() const { return !cu_seqlens.empty(); }
  int tensor_batch(int batch) const { return packed() ? 1 : batch; }
  int tensor_rows(int seqlen) const { return packed() ? cu_seqlens.back() + foreign_rows : seqlen; }

  Sequences sequences() const {
    return {packed() ? cu_seqlens.data() : nullptr, seqused.empty() ? nullptr : seqused.data()};
  }

  // Whether a row of the tensor belongs to a sequence.
  bool holds(int tensor_batch, int row, int batch, int seqlen) const {
    for (int b = packed() ? 0 : tensor_batch; b < (packed() ? batch : tensor_batch + 1); ++b) {
      const Sequence sequence = sequences().at(b, seqlen);
      if (sequence.begin <= row && row < sequence.begin + sequence.length) {
        return true;
      }
    }
    return false;
  }

  std::string describe() const {
    std::string text;
    for (const auto& [name, values] :
         {std::pair{" cu_seqlens", cu_seqlens}, std::pair{" seqused", seqused}}) {
      text += values.empty() ? "" : name;
      for (int32_t value : values) {
        text += concat(" ", value);
      }
    }
    return text;
  }
};

// Dimensions that a bias or a mask has; it is broadcast over the others.
inline constexpr int kAbsent = -1;
inline constexpr int kBatchAxis = 1, kHeadAxis = 2, kQueryAxis = 4, kKeyAxis = 8, kAllAxes = 15;

// Elements of a bias, its gradient or a mask, and how they are broadcast.
class ScoreArray {
 public:
  // queries, keys: elements of these dimensions. transposed: queries are the inner one. alignment:
  // of all strides but the inner one, in elements.
  ScoreArray(int element_bytes, int axes, int batch, int heads, int queries, int keys,
             bool transposed, int alignment = 1)
      : element_bytes_(element_bytes), sizes_{batch, heads, queries, keys} {
    int64_t stride = 1;
    const int order[] = {transposed ? 2 : 3, transposed ? 3 : 2, 1, 0};
    for (const int dimension : order) {
      const bool present = axes != kAbsent && (axes >> dimension & 1) != 0;
      sizes_[dimension] = present ? sizes_[dimension] : 1;
      strides_[dimension] = sizes_[dimension] == 1 ? 0 : stride;
      const int gap = present && dimension >= 2 ? 3 : 0;
      stride = round_up(stride * sizes_[dimension] + gap, int64_t{alignment});
    }
    const bool empty = axes == kAbsent || batch == 0 || queries == 0 || keys == 0;
    const int64_t last = index(sizes_[0] - 1, sizes_[1] - 1, sizes_[2] - 1, sizes_[3] - 1);
    bytes.assign(empty ? 0 : (last + 1) * element_bytes, kPoison);
  }

  int64_t count() const { return bytes.size() / element_bytes_; }
  int64_t index(int batch, int head, int query, int key) const {
    return batch * strides_[0] + head * strides_[1] + query * strides_[2] + key * strides_[3];
  }
  ScoreTensor tensor() {
    return {bytes.empty() ? nullptr : bytes.data(), strides_[0], strides_[1], strides_[2],
            strides_[3]};
  }
  template <typename Visitor>
  void for_each(Visitor visit) const {
    for (int batch = 0; !bytes.empty() && batch < sizes_[0]; ++batch) {
      for (int head = 0; head < sizes_[1]; ++head) {
        for (int query = 0; query < sizes_[2]; ++query) {
          for (int key = 0; key < sizes_[3]; ++key) {
            visit(batch, head, query, key);
          }
        }
      }
    }
  }

  std::vector<unsigned char> bytes;

 private:
  int element_bytes_;
  int sizes_[4];
  int64_t strides_[4];
};

// Rules of common/score_rules.h: the axes of the bias and of masks, and which others there are.
struct RulesCase {
  int bias = kAbsent;
  Dtype bias_dtype = Dtype::kFloat32;
  int mask = kAbsent;
  int padding = kAbsent;  // a second mask
  int blocks = kAbsent;   // a mask with a byte for 128 x 128 pairs
  bool transposed = false;
  std::vector<int32_t> prefix_lens = {};
  // Queries and keys of one document: that many neighbours, or those that are as far apart.
  int document_length = 0;
  int document_distance = 0;

  std::string describe() const {
    return concat(" bias ", bias, " ", name_of(bias_dtype), " mask ", mask, " padding ", padding,
                  " blocks ", blocks, transposed ? " transposed" : "", " prefixes ",
                  prefix_lens.size(), " documents ", document_length, "/", document_distance);
  }
};

struct Case {
  Shape shape;
  long long left = -1;
  long long right = -1;
  Layout layout = Layout::kContiguous;
  double size = 1;   // of the elements of q and k
  double scale = 0;  // 0: 1 / sqrt(head_dim)
  Lengths queries = {};
  Lengths keys = {};
  RulesCase rules = {};

  double softmax_scale() const { return scale == 0 ? 1 / std::sqrt(shape.head_dim) : scale; }
  WindowMask window() const { return {shape.seqlen_q, shape.seqlen_k, left, right}; }
  bool fixed_lengths() const {
    return !queries.packed() && !keys.packed() && queries.seqused.empty() && keys.seqused.empty();
  }
  bool holds_query(int tensor_batch, int row) const {
    return queries.holds(tensor_batch, row, shape.batch, shape.seqlen_q);
  }
  bool holds_key(int tensor_batch, int row) const {
    return keys.holds(tensor_batch, row, shape.batch, shape.seqlen_k);
  }
  std::string describe() const {
    return concat("batch ", shape.batch, " heads ", shape.num_heads, "/", shape.num_heads_kv,
                  " seqlen ", shape.seqlen_q, "x", shape.seqlen_k, " head_dim ", shape.head_dim,
                  "/", shape.head_dim_v, " window ", left, ",", right, " layout ",
                  static_cast<int>(layout), " size ", size, " queries", queries.describe(), " keys",
                  keys.describe(), rules.describe());
  }
};

// A bias, masks, prefixes and documents.
class Rules {
 public:
  explicit Rules(const Case& c)
      : bias(size_of(c.rules.bias_dtype), c.rules.bias, c.shape.batch, c.shape.num_heads,
             c.shape.seqlen_q, c.shape.seqlen_k, c.rules.transposed),
        dbias(size_of(c.rules.bias_dtype), c.rules.bias, c.shape.batch, c.shape.num_heads,
              c.shape.seqlen_q, c.shape.seqlen_k, !c.rules.transposed),
        masks{mask(c, c.rules.mask, 1), mask(c, c.rules.blocks, kBlock),
              mask(c, c.rules.padding, 1)},
        c_(c) {
    std::mt19937 random(2);
    // Noise, but whole tiles of one kind too.
    masks[0].for_each([&](int b, int h, int i, int j) {
      const int tile = (i / 64 + 2 * (j / 64) + h + b) % 4;
      const bool keep = tile == 0 || (tile != 1 && random() % 4 != 0);
      masks[0].bytes[masks[0].index(b, h, i, j)] = keep ? 1 + random() % 255 : 0;
    });
    masks[1].for_each([&](int b, int h, int i, int j) {
      masks[1].bytes[masks[1].index(b, h, i, j)] = (i + 2 * j + h + b) % 3 != 1;
    });
    masks[2].for_each([&](int b, int h, int i, int j) {
      masks[2].bytes[masks[2].index(b, h, i, j)] = (7 * i + j + h + b) % 9 != 0;
    });
    const int longest = std::max(c.shape.seqlen_q, c.shape.seqlen_k);
    for (int index = 0; index < c.shape.batch * longest; ++index) {
      const int row = index % longest;
      if (c.rules.document_length != 0) {
        documents_.push_back((row + 10 * (index / longest)) / c.rules.document_length);
      } else if (c.rules.document_distance != 0) {
        documents_.push_back(row % c.rules.document_distance - 1);
      }
    }
    std::uniform_real_distribution<double> uniform(-2, 2);
    for (int b = 0; !bias.bytes.empty() && b < c.shape.batch; ++b) {
      const int seqlen_q = c.queries.sequences().at(b, c.shape.seqlen_q).length;
      const int seqlen_k = c.keys.sequences().at(b, c.shape.seqlen_k).length;
      for (int h = 0; h < c.shape.num_heads; ++h) {
        for (int i = 0; i < seqlen_q; ++i) {
          for (int j = 0; j < seqlen_k; ++j) {
            if (sees(b, h, i, j) && std::isnan(bias_at(b, h, i, j))) {
              const double value = random() % 16 == 0 ? -kInfinity : uniform(random);
              write(c.rules.bias_dtype,
                    bias.bytes.data() + bias.index(b, h, i, j) * size_of(c.rules.bias_dtype),
                    value);
            }
          }
        }
      }
    }
  }
  Rules(const Rules&) = delete;

  // Of a pair that exists.
  bool sees(int b, int h, int i, int j) const {
    const Shape& s = c_.shape;
    const int seqlen_q = c_.queries.sequences().at(b, s.seqlen_q).length;
    const int seqlen_k = c_.keys.sequences().at(b, s.seqlen_k).length;
    const bool in_prefix = !c_.rules.prefix_lens.empty() && j < c_.rules.prefix_lens[b];
    if (!in_prefix && !WindowMask(seqlen_q, seqlen_k, c_.left, c_.right).allows(i, j)) {
      return false;
    }
    const int64_t first = int64_t{b} * std::max(s.seqlen_q, s.seqlen_k);
    if (!documents_.empty() && documents_[first + i] != documents_[first + j]) {
      return false;
    }
    const auto keeps = [&](const ScoreArray& mask, int block) {
      return mask.bytes.empty() || mask.bytes[mask.index(b, h, i / block, j / block)] != 0;
    };
    return keeps(masks[0], 1) && keeps(masks[1], kBlock) && keeps(masks[2], 1);
  }

  // 0 without a bias.
  double bias_at(int b, int h, int i, int j) const {
    const Dtype dtype = c_.rules.bias_dtype;
    return bias.bytes.empty()
               ? 0
               : read(dtype, bias.bytes.data() + bias.index(b, h, i, j) * size_of(dtype));
  }

  ScoreRules given() {
    ScoreRules rules;
    rules.bias = bias.tensor();
    rules.bias_dtype = c_.rules.bias_dtype;
    int given = 0;
    for (ScoreArray& mask : masks) {
      if (!mask.bytes.empty()) {
        rules.masks[given++] = {mask.tensor(), &mask == &masks[1] ? 7 : 0};
      }
    }
    rules.document_ids = documents_.empty() ? nullptr : documents_.data();
    rules.document_stride = std::max(c_.shape.seqlen_q, c_.shape.seqlen_k);
    rules.prefix_lens = c_.rules.prefix_lens.empty() ? nullptr : c_.rules.prefix_lens.data();
    return rules;
  }

  ScoreArray bias, dbias;
  ScoreArray masks[3];

 private:
  static constexpr int kBlock = 128;
  static ScoreArray mask(const Case& c, int axes, int block) {
    return {1,
            axes,
            c.shape.batch,
            c.shape.num_heads,
            ceil_div(c.shape.seqlen_q, block),
            ceil_div(c.shape.seqlen_k, block),
            c.rules.transposed};
  }

  const Case& c_;
  std::vector<int32_t> documents_;
};

inline constexpr int kGuards = 4;  // poisoned numbers before and after row statistics

// All tensors of both passes. Rows of no sequence hold NaN.
struct Problem {
  Problem(Dtype dtype, const Case& c)
      : dtype(dtype),
        c(c),
        q(query_tensor(c.shape.head_dim)),
        out(query_tensor(c.shape.head_dim_v)),
        dout(query_tensor(c.shape.head_dim_v)),
        dq(query_tensor(c.shape.head_dim)),
        k(key_tensor(c.shape.head_dim)),
        v(key_tensor(c.shape.head_dim_v)),
        dk(key_tensor(c.shape.head_dim)),
        dv(key_tensor(c.shape.head_dim_v)),
        rules(this->c),
        lse((rows() + 2 * kGuards) * size_of(statistics_dtype()), kPoison),
        delta(lse),
        dlse(lse) {
    std::mt19937 random(1);
    const auto is_query = [&c](int b, int row) { return c.holds_query(b, row); };
    const auto is_key = [&c](int b, int row) { return c.holds_key(b, row); };
    q.randomize(random, c.size, is_query);
    k.randomize(random, c.size, is_key);
    v.randomize(random, 1, is_key);
    dout.randomize(random, 1, is_query);
    std::uniform_real_distribution<double> uniform(-1, 1);
    for (int64_t row = 0; row < rows(); ++row) {
      if (holds_statistic(row)) {
        write(statistics_dtype(), statistic(dlse, row), uniform(random));
      }
    }
  }

  Dtype statistics_dtype() const {
    return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  }
  int query_rows() const { return c.queries.tensor_rows(c.shape.seqlen_q); }
  int64_t rows() const {
    return int64_t{c.queries.tensor_batch(c.shape.batch)} * c.shape.num_heads * query_rows();
  }
  // The first row statistic of a head.
  int64_t first_row(int batch, int head) const {
    const int64_t heads = c.queries.packed() ? head : int64_t{batch} * c.shape.num_heads + head;
    return heads * query_rows();
  }
  bool holds_statistic(int64_t row) const {
    const int64_t per_batch = int64_t{c.shape.num_heads} * query_rows();
    return c.holds_query(static_cast<int>(row / per_batch), static_cast<int>(row % query_rows()));
  }
  void* statistic(std::vector<unsigned char>& values, int64_t row) const {
    return values.data() + (row + kGuards) * size_of(statistics_dtype());
  }
  double read_statistic(std::vector<unsigned char>& values, int64_t row) const {
    return read(statistics_dtype(), statistic(values, row));
  }
  RowStatistics statistics(std::vector<unsigned char>& values) const {
    return {statistic(values, 0), first_row(1, 0), query_rows()};
  }

  void run(ParallelFor parallel_for) {
    const LaunchContext context = {.parallel_for = parallel_for};
    for (std::vector<unsigned char>* output :
         {&out.bytes, &dq.bytes, &dk.bytes, &dv.bytes, &rules.dbias.bytes, &lse, &delta}) {
      std::fill(output->begin(), output->end(), kPoison);
    }
    kernel(Pass::kForward)
        .forward({.shape = c.shape,
                  .window = c.window(),
                  .softmax_scale = c.softmax_scale(),
                  .q = q.view,
                  .k = k.view,
                  .v = v.view,
                  .out = out.view,
                  .softmax_lse = statistics(lse),
                  .queries = c.queries.sequences(),
                  .keys = c.keys.sequences(),
                  .rules = rules.given()},
                 context);
    kernel(Pass::kBackward)
        .backward({.shape = c.shape,
                   .window = c.window(),
                   .softmax_scale = c.softmax_scale(),
                   .q = q.view,
                   .k = k.view,
                   .v = v.view,
                   .out = out.view,
                   .dout = dout.view,
                   .dq = dq.view,
                   .dk = dk.view,
                   .dv = dv.view,
                   .softmax_lse = statistics(lse),
                   .dlse = with_dlse ? statistics(dlse) : RowStatistics{},
                   .delta = statistics(delta),
                   .workspace = {},
                   .queries = c.queries.sequences(),
                   .keys = c.keys.sequences(),
                   .rules = rules.given(),
                   .dbias = rules.dbias.tensor()},
                  context);
  }

  const RegisteredKernel& kernel(Pass pass) const {
    for (int row = 0; row < kNumRows; ++row) {
      const KernelConfig& config = table::kRows[row];
      if (config.family == Family::kCpu && config.pass == pass && config.dtype == dtype) {
        return registry().kernels[row];
      }
    }
    throw std::runtime_error("no kernel");
  }

  std::vector<std::vector<unsigned char>> results() const {
    return {out.bytes, lse, dq.bytes, dk.bytes, dv.bytes, rules.dbias.bytes};
  }

  Dtype dtype;
  Case c;
  Tensor q, out, dout, dq, k, v, dk, dv;
  Rules rules;
  std::vector<unsigned char> lse, delta, dlse;
  bool with_dlse = true;

 private:
  Tensor query_tensor(int head_dim) const {
    return tensor(c.queries, c.shape.seqlen_q, c.shape.num_heads, head_dim);
  }
  Tensor key_tensor(int head_dim) const {
    return tensor(c.keys, c.shape.seqlen_k, c.shape.num_heads_kv, head_dim);
  }
  Tensor tensor(const Lengths& lengths, int seqlen, int heads, int head_dim) const {
    return Tensor(dtype, lengths.tensor_batch(c.shape.batch), lengths.tensor_rows(seqlen), heads,
                  head_dim, c.layout, lengths.packed());
  }
};

// Contiguous chunks, as thread pools deal them, on kThreads threads.
template <int kThreads>
void parallel_for(int64_t begin, int64_t end, int64_t,
                  void (*body)(int64_t begin, int64_t end, void* context), void* context) {
  const int64_t chunk = (end - begin + kThreads - 1) / kThreads;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += chunk) {
    threads.emplace_back(body, first, std::min(first + chunk, end), context);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

}  // namespace fa::test
