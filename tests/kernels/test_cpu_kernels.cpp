// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels of every instruction set of this machine against a naive reference in double:
// both passes, all dtypes. Outputs arrive full of NaN and must leave without; memory between the
// rows of a strided tensor and rows of no sequence hold NaN too, must stay as they were and must
// not matter.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "tests/support/cpu_problem.h"

namespace {

using namespace fa::test;
using fa::Dtype;
using fa::Shape;

constexpr Dtype kDtypes[] = {Dtype::kFloat64, Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16};

using Matrix = std::vector<double>;

// Compares every element of a result with the reference (batch, seqlen, heads, head_dim), which is
// NaN in rows of no sequence.
void compare(const std::string& name, const Tensor& result, const Matrix& expected, double relative,
             double absolute) {
  size_t index = 0;
  result.for_each([&](int b, int r, int h, int c) {
    const double wanted = expected[index++];
    const double got = result.at(b, r, h, c);
    if (std::isnan(wanted)) {
      require(result.untouched(b, r, h, c),
              fa::concat(name, " was written in row ", r, ", which is in no sequence"));
    } else if (!(std::abs(got - wanted) <= relative * std::abs(wanted) + absolute)) {
      throw std::runtime_error(fa::concat(name, "[", b, ",", r, ",", h, ",", c, "] is ", got,
                                          " but should be ", wanted));
    }
  });
  result.require_untouched_gaps(name);
}

// (batch, seqlen, heads, head_dim) of zeros, and of NaN in rows of no sequence.
template <typename Exists>
Matrix zeros_like(const Tensor& tensor, const Exists& exists) {
  Matrix result;
  tensor.for_each([&](int b, int r, int, int) { result.push_back(exists(b, r) ? 0 : NAN); });
  return result;
}

void compare_with_reference(Problem& problem) {
  const auto& [dtype, c, q, out, dout, dq, k, v, dk, dv, lse, delta, dlse, with_dlse] = problem;
  const Shape& s = c.shape;
  const int d = s.head_dim;
  const auto is_query = [&c = c](int b, int row) { return c.holds_query(b, row); };
  const auto is_key = [&c = c](int b, int row) { return c.holds_key(b, row); };
  Matrix out_wanted = zeros_like(out, is_query);
  Matrix dq_wanted(out_wanted);
  Matrix dk_wanted = zeros_like(dk, is_key);
  Matrix dv_wanted(dk_wanted);
  const auto exact = problem.statistics_dtype();
  const double noise = half_ulp(exact) * 64;
  const double score_noise =
      noise * (1 + c.size * c.size * std::abs(c.softmax_scale()) * std::sqrt(d));

  for (int b = 0; b < s.batch; ++b) {
    const fa::Sequence queries = c.queries.sequences().at(b, s.seqlen_q);
    const fa::Sequence keys = c.keys.sequences().at(b, s.seqlen_k);
    const fa::WindowMask window(queries.length, keys.length, c.left, c.right);
    const int b_q = c.queries.packed() ? 0 : b;
    const int b_k = c.keys.packed() ? 0 : b;
    const auto row_of = [&](int head, int query) {
      return (int64_t{b_q} * problem.query_rows() + queries.begin + query) * s.num_heads + head;
    };
    const auto key_row_of = [&](int head, int key) {
      const int64_t rows = c.keys.tensor_rows(s.seqlen_k);
      return (b_k * rows + keys.begin + key) * s.num_heads_kv + head;
    };
    for (int h = 0; h < s.num_heads; ++h) {
      const int h_kv = h / s.group_size();
      for (int i = 0; i < queries.length; ++i) {
        const int query = queries.begin + i;
        Matrix p(keys.length), dp(keys.length);
        double maximum = -kInfinity;
        for (int j = 0; j < keys.length; ++j) {
          const int key = keys.begin + j;
          p[j] = -kInfinity;
          if (window.allows(i, j)) {
            double dot = 0;
            for (int x = 0; x < d; ++x) {
              dot += q.at(b_q, query, h, x) * k.at(b_k, key, h_kv, x);
              dp[j] += dout.at(b_q, query, h, x) * v.at(b_k, key, h_kv, x);
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
        const int64_t row = problem.first_row(b, h) + query;
        const double lse_wanted = sum == 0 ? -kInfinity : maximum + std::log(sum);
        const double lse_got = problem.read_statistic(problem.lse, row);
        require(lse_got == lse_wanted || std::abs(lse_got - lse_wanted) <= score_noise,
                fa::concat("softmax_lse[", b, ",", h, ",", i, "] is ", lse_got, " but should be ",
                           lse_wanted));
        double delta_wanted = with_dlse ? -problem.read_statistic(problem.dlse, row) : 0;
        for (int j = 0; j < keys.length; ++j) {
          p[j] = sum == 0 ? 0 : p[j] / sum;
          delta_wanted += p[j] * dp[j];
        }
        const int64_t q_row = row_of(h, i) * d;
        for (int j = 0; j < keys.length; ++j) {
          const int key = keys.begin + j;
          const double ds = p[j] * (dp[j] - delta_wanted) * c.softmax_scale();
          const int64_t k_row = key_row_of(h_kv, j) * d;
          for (int x = 0; p[j] != 0 && x < d; ++x) {
            out_wanted[q_row + x] += p[j] * v.at(b_k, key, h_kv, x);
            dq_wanted[q_row + x] += ds * k.at(b_k, key, h_kv, x);
            dk_wanted[k_row + x] += ds * q.at(b_q, query, h, x);
            dv_wanted[k_row + x] += p[j] * dout.at(b_q, query, h, x);
          }
        }
      }
    }
  }
  // One rounding to the dtype; the error of sums and of exp; and delta from the rounded out.
  const double ulp = half_ulp(dtype) * 1.01;
  const double tiny = dtype == Dtype::kFloat16 ? 0x1p-25 : 0;
  const double rows_per_key = s.group_size() * s.seqlen_q;
  const double ds_noise =
      (4 * score_noise + ulp) * c.size * std::abs(c.softmax_scale()) * std::sqrt(d);
  compare("out", out, out_wanted, ulp, 2 * score_noise + tiny);
  compare("dq", dq, dq_wanted, ulp, 4 * ds_noise + tiny);
  compare("dk", dk, dk_wanted, ulp, 4 * ds_noise * (1 + std::sqrt(rows_per_key)) + tiny);
  compare("dv", dv, dv_wanted, ulp, 2 * score_noise * (1 + std::sqrt(rows_per_key)) + tiny);
  for (std::vector<unsigned char>* values : {&problem.lse, &problem.delta}) {
    for (int64_t row = -kGuards; row < problem.rows() + kGuards; ++row) {
      const bool guard = row < 0 || row >= problem.rows() || !problem.holds_statistic(row);
      require(!guard || std::isnan(problem.read_statistic(*values, row)),
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
  if (s.batch == 0 || s.seqlen_q == 0 || s.seqlen_k == 0 || window.is_full() ||
      !problem.c.fixed_lengths()) {
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

// Packed sequences, used parts of them, and both; for either way of dividing the backward pass.
std::vector<Case> varlen_cases() {
  const Lengths packed_q = {.cu_seqlens = {0, 70, 70, 71, 200}, .foreign_rows = 5};
  const Lengths packed_k = {.cu_seqlens = {3, 100, 130, 130, 290}};
  const Lengths used_q = {.seqused = {65, 0, 130, 1}};
  const Lengths used_k = {.seqused = {0, 150, 66, 128}};
  const Lengths both_q = {.cu_seqlens = {2, 80, 90, 90, 220}, .seqused = {64, 3, 0, 130}};
  const Lengths both_k = {
      .cu_seqlens = {0, 70, 80, 95, 290}, .seqused = {70, 0, 9, 100}, .foreign_rows = 3};
  std::vector<Case> cases;
  for (const int heads_kv : {1, 4}) {
    for (const auto& [left, right] : {std::pair{-1, -1}, {-1, 0}, {20, 5}}) {
      const Case fixed = {.shape = {4, 4, heads_kv, 130, 195, 24},
                          .left = left,
                          .right = right,
                          .layout = right == 0 ? Layout::kPadded : Layout::kHeadsFirst};
      for (const auto& [queries, keys] : {std::pair{packed_q, packed_k},
                                          {used_q, used_k},
                                          {both_q, both_k},
                                          {packed_q, used_k},
                                          {used_q, both_k},
                                          {Lengths{}, packed_k},
                                          {both_q, Lengths{}}}) {
        Case c = fixed;
        c.queries = queries;
        c.keys = keys;
        cases.push_back(c);
      }
    }
  }
  return cases;
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
  const std::vector<Case> varlen = varlen_cases();
  cases.insert(cases.end(), varlen.begin(), varlen.end());
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
