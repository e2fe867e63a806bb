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
  Tensor(Dtype dtype, int batch, int seqlen, int heads, int head_dim, Layout layout)
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

  void randomize(std::mt19937& random, double size) {
    std::uniform_real_distribution<double> uniform(-size, size);
    for_each([&](int b, int r, int h, int c) { set(b, r, h, c, uniform(random)); });
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

struct Case {
  Shape shape;
  long long left = -1;
  long long right = -1;
  Layout layout = Layout::kContiguous;
  double size = 1;   // of the elements of q and k
  double scale = 0;  // 0: 1 / sqrt(head_dim)

  double softmax_scale() const { return scale == 0 ? 1 / std::sqrt(shape.head_dim) : scale; }
  WindowMask window() const { return {shape.seqlen_q, shape.seqlen_k, left, right}; }
  std::string describe() const {
    return concat("batch ", shape.batch, " heads ", shape.num_heads, "/", shape.num_heads_kv,
                  " seqlen ", shape.seqlen_q, "x", shape.seqlen_k, " head_dim ", shape.head_dim,
                  " window ", left, ",", right, " layout ", static_cast<int>(layout), " size ",
                  size);
  }
};

inline constexpr int kGuards = 4;  // poisoned numbers before and after row statistics

inline std::vector<unsigned char> row_statistics(Dtype dtype, const Shape& shape) {
  const size_t bytes = dtype == Dtype::kFloat64 ? 8 : 4;
  return std::vector<unsigned char>(
      (shape.row_statistics_offset(shape.batch, 0) + 2 * kGuards) * bytes, kPoison);
}

// All tensors of both passes.
struct Problem {
  Problem(Dtype dtype, const Case& c)
      : dtype(dtype),
        c(c),
        q(dtype, c.shape.batch, c.shape.seqlen_q, c.shape.num_heads, c.shape.head_dim, c.layout),
        out(dtype, c.shape.batch, c.shape.seqlen_q, c.shape.num_heads, c.shape.head_dim, c.layout),
        dout(dtype, c.shape.batch, c.shape.seqlen_q, c.shape.num_heads, c.shape.head_dim, c.layout),
        dq(dtype, c.shape.batch, c.shape.seqlen_q, c.shape.num_heads, c.shape.head_dim, c.layout),
        k(dtype, c.shape.batch, c.shape.seqlen_k, c.shape.num_heads_kv, c.shape.head_dim, c.layout),
        v(dtype, c.shape.batch, c.shape.seqlen_k, c.shape.num_heads_kv, c.shape.head_dim, c.layout),
        dk(dtype, c.shape.batch, c.shape.seqlen_k, c.shape.num_heads_kv, c.shape.head_dim,
           c.layout),
        dv(dtype, c.shape.batch, c.shape.seqlen_k, c.shape.num_heads_kv, c.shape.head_dim,
           c.layout),
        lse(row_statistics(dtype, c.shape)),
        delta(lse),
        dlse(lse) {
    std::mt19937 random(1);
    q.randomize(random, c.size);
    k.randomize(random, c.size);
    v.randomize(random, 1);
    dout.randomize(random, 1);
    std::uniform_real_distribution<double> uniform(-1, 1);
    for (int64_t row = 0; row < rows(); ++row) {
      write(statistics_dtype(), statistic(dlse, row), uniform(random));
    }
  }

  Dtype statistics_dtype() const {
    return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  }
  int64_t rows() const { return c.shape.row_statistics_offset(c.shape.batch, 0); }
  void* statistic(std::vector<unsigned char>& values, int64_t row) const {
    return values.data() + (row + kGuards) * size_of(statistics_dtype());
  }
  double read_statistic(std::vector<unsigned char>& values, int64_t row) const {
    return read(statistics_dtype(), statistic(values, row));
  }

  void run(ParallelFor parallel_for) {
    const LaunchContext context = {.parallel_for = parallel_for};
    for (std::vector<unsigned char>* output :
         {&out.bytes, &dq.bytes, &dk.bytes, &dv.bytes, &lse, &delta}) {
      std::fill(output->begin(), output->end(), kPoison);
    }
    const FwdParams fwd = {c.shape, c.window(), c.softmax_scale(), q.view,
                           k.view,  v.view,     out.view,          statistic(lse, 0)};
    kernel(Pass::kForward).forward(fwd, context);
    const BwdParams bwd = {c.shape,
                           c.window(),
                           c.softmax_scale(),
                           q.view,
                           k.view,
                           v.view,
                           out.view,
                           dout.view,
                           statistic(lse, 0),
                           with_dlse ? statistic(dlse, 0) : nullptr,
                           statistic(delta, 0),
                           dq.view,
                           dk.view,
                           dv.view};
    kernel(Pass::kBackward).backward(bwd, context);
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
