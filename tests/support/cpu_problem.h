// SPDX-License-Identifier: BSD-3-Clause
// An attention problem for the CPU kernels: random inputs, and outputs full of NaN, in tensors of
// any dtype and layout whose gaps hold NaN too.
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

// Values of the tests are normal numbers of their dtype, or zero, so truncation is all it takes.
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
    const uint32_t half = magnitude < 113u << 23 ? 0 : (magnitude - (112u << 23)) >> 13;
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

struct Case {
  Shape shape;
  long long left = -1;
  long long right = -1;
  Layout layout = Layout::kContiguous;
  double size = 1;   // of the elements of q and k
  double scale = 0;  // 0: 1 / sqrt(head_dim)
  Lengths queries = {};
  Lengths keys = {};

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
                  " window ", left, ",", right, " layout ", static_cast<int>(layout), " size ",
                  size, " queries", queries.describe(), " keys", keys.describe());
  }
};

inline constexpr int kGuards = 4;  // poisoned numbers before and after row statistics

// All tensors of both passes. Rows of no sequence hold NaN.
struct Problem {
  Problem(Dtype dtype, const Case& c)
      : dtype(dtype),
        c(c),
        q(query_tensor()),
        out(query_tensor()),
        dout(query_tensor()),
        dq(query_tensor()),
        k(key_tensor()),
        v(key_tensor()),
        dk(key_tensor()),
        dv(key_tensor()),
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
         {&out.bytes, &dq.bytes, &dk.bytes, &dv.bytes, &lse, &delta}) {
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
                  .keys = c.keys.sequences()},
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
                   .keys = c.keys.sequences()},
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
    return {out.bytes, lse, dq.bytes, dk.bytes, dv.bytes};
  }

  Dtype dtype;
  Case c;
  Tensor q, out, dout, dq, k, v, dk, dv;
  std::vector<unsigned char> lse, delta, dlse;
  bool with_dlse = true;

 private:
  Tensor query_tensor() const { return tensor(c.queries, c.shape.seqlen_q, c.shape.num_heads); }
  Tensor key_tensor() const { return tensor(c.keys, c.shape.seqlen_k, c.shape.num_heads_kv); }
  Tensor tensor(const Lengths& lengths, int seqlen, int heads) const {
    return Tensor(dtype, lengths.tensor_batch(c.shape.batch), lengths.tensor_rows(seqlen), heads,
                  c.shape.head_dim, c.layout, lengths.packed());
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
