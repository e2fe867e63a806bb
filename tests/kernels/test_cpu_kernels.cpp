// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels of every instruction set of this machine against a naive reference in double:
// both passes, all dtypes. Outputs arrive full of NaN and must leave without; memory between the
// rows of a strided tensor holds NaN too, must stay as it was and must not matter.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/check.h"
#include "cpu/isa.h"
#include "dispatch/registry.h"

namespace {

using fa::Dtype;
using fa::Range;
using fa::Shape;

constexpr Dtype kDtypes[] = {Dtype::kFloat64, Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16};
constexpr double kInfinity = HUGE_VAL;
constexpr unsigned char kPoison = 0xff;  // four dtypes read NaN where all bytes are this

void require(bool condition, const std::string& what) {
  if (!condition) {
    throw std::runtime_error(what);
  }
}

size_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Half the distance from 1 to the next number: the error of one rounding.
double half_ulp(Dtype dtype) {
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

double read(Dtype dtype, const void* source) {
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
void write(Dtype dtype, void* target, double number) {
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
    const uint16_t stored =
        dtype == Dtype::kBFloat16 ? bits >> 16 : (bits >> 16 & 0x8000) | half;
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
  fa::TensorView view;

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
  double size = 1;  // of the elements of q and k
  double scale = 0;  // 0: 1 / sqrt(head_dim)

  double softmax_scale() const { return scale == 0 ? 1 / std::sqrt(shape.head_dim) : scale; }
  fa::WindowMask window() const { return {shape.seqlen_q, shape.seqlen_k, left, right}; }
  std::string describe() const {
    return fa::concat("batch ", shape.batch, " heads ", shape.num_heads, "/", shape.num_heads_kv,
                      " seqlen ", shape.seqlen_q, "x", shape.seqlen_k, " head_dim ",
                      shape.head_dim, " window ", left, ",", right, " layout ",
                      static_cast<int>(layout), " size ", size);
  }
};

constexpr int kGuards = 4;  // poisoned numbers before and after row statistics

std::vector<unsigned char> row_statistics(Dtype dtype, const Shape& shape) {
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
        dout(dtype, c.shape.batch, c.shape.seqlen_q, c.shape.num_heads, c.shape.head_dim,
             c.layout),
        dq(dtype, c.shape.batch, c.shape.seqlen_q, c.shape.num_heads, c.shape.head_dim, c.layout),
        k(dtype, c.shape.batch, c.shape.seqlen_k, c.shape.num_heads_kv, c.shape.head_dim,
          c.layout),
        v(dtype, c.shape.batch, c.shape.seqlen_k, c.shape.num_heads_kv, c.shape.head_dim,
          c.layout),
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

  void run(fa::ParallelFor parallel_for) {
    const fa::LaunchContext context = {.parallel_for = parallel_for};
    for (std::vector<unsigned char>* output :
         {&out.bytes, &dq.bytes, &dk.bytes, &dv.bytes, &lse, &delta}) {
      std::fill(output->begin(), output->end(), kPoison);
    }
    const fa::FwdParams fwd = {c.shape, c.window(), c.softmax_scale(), q.view,
                               k.view,  v.view,     out.view,          statistic(lse, 0)};
    kernel(fa::Pass::kForward).forward(fwd, context);
    const fa::BwdParams bwd = {c.shape,
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
    kernel(fa::Pass::kBackward).backward(bwd, context);
  }

  const fa::RegisteredKernel& kernel(fa::Pass pass) const {
    for (int row = 0; row < fa::kNumRows; ++row) {
      const fa::KernelConfig& config = fa::table::kRows[row];
      if (config.family == fa::Family::kCpu && config.pass == pass && config.dtype == dtype) {
        return fa::registry().kernels[row];
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

using Matrix = std::vector<double>;

// Compares every element of a result with the reference (batch, seqlen, heads, head_dim).
void compare(const std::string& name, const Tensor& result, const Matrix& expected,
             double relative, double absolute) {
  size_t index = 0;
  result.for_each([&](int b, int r, int h, int c) {
    const double wanted = expected[index++];
    const double got = result.at(b, r, h, c);
    if (!(std::abs(got - wanted) <= relative * std::abs(wanted) + absolute)) {
      throw std::runtime_error(fa::concat(name, "[", b, ",", r, ",", h, ",", c, "] is ", got,
                                          " but should be ", wanted));
    }
  });
  result.require_untouched_gaps(name);
}

void compare_with_reference(Problem& problem) {
  const auto& [dtype, c, q, out, dout, dq, k, v, dk, dv, lse, delta, dlse, with_dlse] = problem;
  const Shape& s = c.shape;
  const int d = s.head_dim;
  const fa::WindowMask window = c.window();
  Matrix out_wanted(int64_t{s.batch} * s.seqlen_q * s.num_heads * d);
  Matrix dq_wanted(out_wanted);
  Matrix dk_wanted(int64_t{s.batch} * s.seqlen_k * s.num_heads_kv * d);
  Matrix dv_wanted(dk_wanted);
  const auto exact = problem.statistics_dtype();
  const double noise = half_ulp(exact) * 64;
  const double score_noise =
      noise * (1 + c.size * c.size * std::abs(c.softmax_scale()) * std::sqrt(d));

  for (int b = 0; b < s.batch; ++b) {
    for (int h = 0; h < s.num_heads; ++h) {
      const int h_kv = h / s.group_size();
      for (int i = 0; i < s.seqlen_q; ++i) {
        Matrix p(s.seqlen_k), dp(s.seqlen_k);
        double maximum = -kInfinity;
        for (int j = 0; j < s.seqlen_k; ++j) {
          p[j] = -kInfinity;
          if (window.allows(i, j)) {
            double dot = 0;
            for (int x = 0; x < d; ++x) {
              dot += q.at(b, i, h, x) * k.at(b, j, h_kv, x);
              dp[j] += dout.at(b, i, h, x) * v.at(b, j, h_kv, x);
            }
            p[j] = dot * c.softmax_scale();
            maximum = std::max(maximum, p[j]);
          }
        }
        double sum = 0;
        for (double& score : p) {
          score = score == -kInfinity ? 0 : std::exp(score - maximum);
          sum += score;
        }
        const int64_t row = s.row_statistics_offset(b, h) + i;
        const double lse_wanted = sum == 0 ? -kInfinity : maximum + std::log(sum);
        const double lse_got = problem.read_statistic(problem.lse, row);
        require(lse_got == lse_wanted || std::abs(lse_got - lse_wanted) <= score_noise,
                fa::concat("softmax_lse[", b, ",", h, ",", i, "] is ", lse_got, " but should be ",
                           lse_wanted));
        double delta_wanted = with_dlse ? -problem.read_statistic(problem.dlse, row) : 0;
        for (int j = 0; j < s.seqlen_k; ++j) {
          p[j] = sum == 0 ? 0 : p[j] / sum;
          delta_wanted += p[j] * dp[j];
        }
        const int64_t q_row = ((int64_t{b} * s.seqlen_q + i) * s.num_heads + h) * d;
        for (int j = 0; j < s.seqlen_k; ++j) {
          const double ds = p[j] * (dp[j] - delta_wanted) * c.softmax_scale();
          const int64_t k_row = ((int64_t{b} * s.seqlen_k + j) * s.num_heads_kv + h_kv) * d;
          for (int x = 0; p[j] != 0 && x < d; ++x) {
            out_wanted[q_row + x] += p[j] * v.at(b, j, h_kv, x);
            dq_wanted[q_row + x] += ds * k.at(b, j, h_kv, x);
            dk_wanted[k_row + x] += ds * q.at(b, i, h, x);
            dv_wanted[k_row + x] += p[j] * dout.at(b, i, h, x);
          }
        }
      }
    }
  }
  // One rounding to the dtype; the error of sums and of exp; and delta from the rounded out.
  const double ulp = half_ulp(dtype) * 1.01;
  const double tiny = dtype == Dtype::kFloat16 ? 0x1p-25 : 0;
  const double rows_per_key = s.group_size() * s.seqlen_q;
  const double ds_noise = (4 * score_noise + ulp) * c.size * std::abs(c.softmax_scale()) * std::sqrt(d);
  compare("out", out, out_wanted, ulp, 2 * score_noise + tiny);
  compare("dq", dq, dq_wanted, ulp, 4 * ds_noise + tiny);
  compare("dk", dk, dk_wanted, ulp, 4 * ds_noise * (1 + std::sqrt(rows_per_key)) + tiny);
  compare("dv", dv, dv_wanted, ulp, 2 * score_noise * (1 + std::sqrt(rows_per_key)) + tiny);
  for (std::vector<unsigned char>* values : {&problem.lse, &problem.delta}) {
    for (int64_t guard = 0; guard < kGuards; ++guard) {
      require(std::isnan(problem.read_statistic(*values, guard - kGuards)) &&
                  std::isnan(problem.read_statistic(*values, problem.rows() + guard)),
              "row statistics were written outside their rows");
    }
  }
}

// The results do not depend on the threads, and a row does not depend on a key that it cannot see.
void check_bits(Problem& problem) {
  const auto results = problem.results();
  problem.run(parallel_for<3>);
  require(problem.results() == results, "three threads give other bits than one");

  const Shape& s = problem.c.shape;
  const fa::WindowMask window = problem.c.window();
  if (s.batch == 0 || s.seqlen_q == 0 || s.seqlen_k == 0 || window.is_full()) {
    return;
  }
  // The key that fewest rows see: the first or the last, whichever side has a bound.
  const int key = window.allows(0, s.seqlen_k - 1) ? 0 : s.seqlen_k - 1;
  for (int head = 0; head < s.num_heads_kv; ++head) {
    for (int x = 0; x < s.head_dim; ++x) {
      problem.k.set(0, key, head, x, problem.dtype == Dtype::kFloat16 ? 60000 : 2e38);
      problem.v.set(0, key, head, x, problem.dtype == Dtype::kFloat16 ? 60000 : 2e38);
    }
  }
  problem.run(parallel_for<1>);
  for (int row = 0; row < s.seqlen_q; ++row) {
    if (window.allows(row, key)) {
      continue;
    }
    for (int head = 0; head < s.num_heads; ++head) {
      const auto same = [&](const Tensor& tensor, const std::vector<unsigned char>& before) {
        const auto* address = static_cast<unsigned char*>(tensor.view.data) +
                              tensor.view.offset(0, row, head) * size_of(problem.dtype);
        return std::memcmp(address, before.data() + (address - tensor.bytes.data()),
                           s.head_dim * size_of(problem.dtype)) == 0;
      };
      require(same(problem.out, results[0]) && same(problem.dq, results[2]),
              fa::concat("row ", row, " depends on key ", key, ", which it does not see"));
    }
  }
}

// One key has weight 1: the output is its value, for every 16-bit pattern but -0 and NaN.
void check_conversions(Dtype dtype) {
  const Case c = {.shape = {1, 128, 128, 1, 1, 512}};
  Problem problem(dtype, c);
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const uint16_t pattern = static_cast<uint16_t>(bits);
    std::memcpy(problem.v.bytes.data() + 2 * bits, &pattern, 2);
  }
  problem.run(parallel_for<1>);
  for (int bits = 0; bits < 1 << 16; ++bits) {
    uint16_t value, out;
    std::memcpy(&value, problem.v.bytes.data() + 2 * bits, 2);
    std::memcpy(&out, problem.out.bytes.data() + 2 * bits, 2);
    const bool is_nan = std::isnan(read(dtype, &value));
    require(is_nan ? std::isnan(read(dtype, &out)) : out == (value == 0x8000 ? 0 : value),
            fa::concat("conversion turned ", value, " into ", out));
  }
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (int seqlen : {1, 63, 64, 65, 95, 96, 97, 127, 129}) {
    cases.push_back({.shape = {1, 2, 2, seqlen, seqlen, 40}, .right = 0});
    cases.push_back({.shape = {1, 2, 1, seqlen, 77, 8}});
    cases.push_back({.shape = {1, 1, 1, 77, seqlen, 5}, .right = 0, .layout = Layout::kPadded});
  }
  for (int head_dim : {1, 5, 40, 64, 80, 128, 512}) {
    cases.push_back({.shape = {1, 2, 1, 65, 66, head_dim}, .layout = Layout::kPadded});
    cases.push_back({.shape = {8, 2, 2, 34, 50, head_dim}, .right = 0});
  }
  const Case more[] = {
      {.shape = {0, 2, 2, 8, 8, 16}},
      {.shape = {2, 4, 2, 0, 8, 16}},
      {.shape = {2, 4, 2, 8, 0, 16}},
      {.shape = {9, 2, 2, 0, 8, 16}},
      {.shape = {9, 2, 2, 8, 0, 16}, .right = 0},
      {.shape = {2, 8, 2, 130, 130, 64}, .right = 0, .layout = Layout::kHeadsFirst},
      {.shape = {4, 8, 4, 130, 250, 24}, .left = 30, .right = 5, .layout = Layout::kPadded},
      {.shape = {1, 6, 1, 257, 300, 16}, .left = 0, .right = 0},
      {.shape = {1, 6, 1, 300, 257, 16}, .left = 20, .right = -1},
      {.shape = {4, 4, 4, 200, 70, 32}, .right = 0},  // rows that see no key
      {.shape = {1, 2, 2, 70, 200, 32}, .left = 0, .right = 100},
      {.shape = {1, 2, 2, 70, 90, 64}, .size = 100},              // scores to 1e5
      {.shape = {8, 2, 2, 70, 90, 64}, .right = 0, .size = 100},  // the same, task by head
      {.shape = {1, 2, 2, 70, 90, 32}, .right = 0, .scale = -0.5},
  };
  cases.insert(cases.end(), std::begin(more), std::end(more));
  return cases;
}

void run_case(Dtype dtype, const Case& c) {
  Problem problem(dtype, c);
  problem.with_dlse = c.shape.head_dim != 40;
  problem.run(parallel_for<1>);
  compare_with_reference(problem);
  check_bits(problem);
}

}  // namespace

int main() {
  int failures = 0;
  const auto attempt = [&failures](const std::string& name, auto&& test) {
    try {
      test();
    } catch (const std::exception& error) {
      ++failures;
      std::fprintf(stderr, "FAILED %s: %s\n", name.c_str(), error.what());
    }
  };
  int passes = 0;
  for (const std::string& isa : fa::cpu::available_isas()) {
    fa::cpu::select_isa(isa);
    for (const Dtype dtype : kDtypes) {
      const std::string where = isa + " " + name_of(dtype) + " ";
      for (const Case& c : all_cases()) {
        attempt(where + c.describe(), [&] { run_case(dtype, c); });
        ++passes;
      }
      if (size_of(dtype) == 2) {
        attempt(where + "conversions", [&] { check_conversions(dtype); });
      }
    }
    std::printf("%s: done\n", isa.c_str());
  }
  attempt("an unknown instruction set is refused", [] {
    try {
      fa::cpu::select_isa("mmx");
    } catch (const fa::Error&) {
      return;
    }
    throw std::runtime_error("select_isa accepted it");
  });
  std::printf("%d cases, %d failures\n", passes, failures);
  return failures == 0 ? 0 : 1;
}
