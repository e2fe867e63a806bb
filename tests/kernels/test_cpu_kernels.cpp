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

// All elements, as (batch, seqlen, heads, head_dim).
Matrix values_of(const Tensor& tensor) {
  Matrix result;
  tensor.for_each([&](int b, int r, int h, int c) { result.push_back(tensor.at(b, r, h, c)); });
  return result;
}

// The gradient of a bias; what lies between its elements is NaN.
void compare_dbias(Problem& problem, const Matrix& expected, double relative, double absolute) {
  const Dtype dtype = problem.c.rules.bias_dtype;
  const std::vector<unsigned char>& bytes = problem.rules.dbias.bytes;
  for (size_t index = 0; index < expected.size(); ++index) {
    const double wanted = expected[index];
    const double got = read(dtype, bytes.data() + index * size_of(dtype));
    require(std::isnan(wanted) ? std::isnan(got)
                               : std::abs(got - wanted) <= relative * std::abs(wanted) + absolute,
            fa::concat("dbias[", index, "] is ", got, " but should be ", wanted));
  }
}

void compare_with_reference(Problem& problem) {
  const Case& c = problem.c;
  const auto& [batch, heads, heads_kv, seqlen_q, seqlen_k, d, d_v] = c.shape;
  const Dtype dtype = problem.dtype;
  const bool with_dlse = problem.with_dlse;
  const auto is_query = [&c](int b, int row) { return c.holds_query(b, row); };
  const auto is_key = [&c](int b, int row) { return c.holds_key(b, row); };
  const Matrix q = values_of(problem.q), k = values_of(problem.k), v = values_of(problem.v);
  const Matrix dout = values_of(problem.dout);
  Matrix out_wanted = zeros_like(problem.out, is_query);
  Matrix dq_wanted = zeros_like(problem.dq, is_query);
  Matrix dk_wanted = zeros_like(problem.dk, is_key);
  Matrix dv_wanted = zeros_like(problem.dv, is_key);
  const ScoreArray& dbias = problem.rules.dbias;
  Matrix dbias_wanted(dbias.count(), NAN);
  dbias.for_each([&](int b, int h, int i, int j) { dbias_wanted[dbias.index(b, h, i, j)] = 0; });
  const auto exact = problem.statistics_dtype();
  const double noise = half_ulp(exact) * 64;
  const double score_noise =
      noise * (4 + c.size * c.size * std::abs(c.softmax_scale()) * std::sqrt(d));

  for (int b = 0; b < batch; ++b) {
    const fa::Sequence queries = c.queries.sequences().at(b, seqlen_q);
    const fa::Sequence keys = c.keys.sequences().at(b, seqlen_k);
    const int b_q = c.queries.packed() ? 0 : b;
    const int b_k = c.keys.packed() ? 0 : b;
    const auto row_of = [&](int head, int query) {
      return (int64_t{b_q} * problem.query_rows() + queries.begin + query) * c.shape.num_heads +
             head;
    };
    const auto key_row_of = [&](int head, int key) {
      const int64_t rows = c.keys.tensor_rows(c.shape.seqlen_k);
      return (b_k * rows + keys.begin + key) * c.shape.num_heads_kv + head;
    };
    for (int h = 0; h < heads; ++h) {
      const int h_kv = h / c.shape.group_size();
      for (int i = 0; i < queries.length; ++i) {
        const int64_t q_row = row_of(h, i);
        Matrix p(keys.length), dp(keys.length);
        double maximum = -kInfinity;
        for (int j = 0; j < keys.length; ++j) {
          const int64_t k_row = key_row_of(h_kv, j);
          p[j] = -kInfinity;
          if (problem.rules.sees(b, h, i, j)) {
            double dot = 0;
            for (int x = 0; x < d; ++x) {
              dot += q[q_row * d + x] * k[k_row * d + x];
            }
            for (int x = 0; x < d_v; ++x) {
              dp[j] += dout[q_row * d_v + x] * v[k_row * d_v + x];
            }
            p[j] = dot * c.softmax_scale() + problem.rules.bias_at(b, h, i, j);
            maximum = std::max(maximum, p[j]);
          }
        }
        double sum = 0;
        for (double& score : p) {
          score = score == -kInfinity ? 0 : std::exp(score - maximum);
          sum += score;
        }
        const int64_t row = problem.first_row(b, h) + queries.begin + i;
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
        for (int j = 0; j < keys.length; ++j) {
          if (p[j] == 0) {
            continue;
          }
          const double ds = p[j] * (dp[j] - delta_wanted);
          const int64_t k_row = key_row_of(h_kv, j);
          for (int x = 0; x < d; ++x) {
            dq_wanted[q_row * d + x] += ds * c.softmax_scale() * k[k_row * d + x];
            dk_wanted[k_row * d + x] += ds * c.softmax_scale() * q[q_row * d + x];
          }
          for (int x = 0; x < d_v; ++x) {
            out_wanted[q_row * d_v + x] += p[j] * v[k_row * d_v + x];
            dv_wanted[k_row * d_v + x] += p[j] * dout[q_row * d_v + x];
          }
          if (!dbias_wanted.empty()) {
            dbias_wanted[dbias.index(b, h, i, j)] += ds;
          }
        }
      }
    }
  }
  // One rounding to the dtype; the error of sums and of exp; and delta from the rounded out.
  const double ulp = half_ulp(dtype) * 1.01;
  const double tiny = dtype == Dtype::kFloat16 ? 0x1p-25 : 0;
  const double rows_per_key = c.shape.group_size() * seqlen_q;
  const double ds_noise = (4 * score_noise + ulp) * std::sqrt(d_v);
  const double dqk_noise = ds_noise * c.size * std::abs(c.softmax_scale());
  compare("out", problem.out, out_wanted, ulp, 2 * score_noise + tiny);
  compare("dq", problem.dq, dq_wanted, ulp, 4 * dqk_noise + tiny);
  compare("dk", problem.dk, dk_wanted, ulp, 4 * dqk_noise * (1 + std::sqrt(rows_per_key)) + tiny);
  compare("dv", problem.dv, dv_wanted, ulp, 2 * score_noise * (1 + std::sqrt(rows_per_key)) + tiny);
  if (!dbias_wanted.empty()) {
    const Dtype bias_dtype = c.rules.bias_dtype;
    const double sums = double(batch) * heads * seqlen_q * seqlen_k / dbias.count();
    compare_dbias(problem, dbias_wanted, half_ulp(bias_dtype) * 1.01,
                  ds_noise * (1 + std::sqrt(sums)) + (bias_dtype == Dtype::kFloat16 ? 0x1p-25 : 0));
  }
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
  const bool ruled = problem.rules.given().any();
  if (s.batch == 0 || s.seqlen_q == 0 || s.seqlen_k == 0 || (window.is_full() && !ruled) ||
      !problem.c.fixed_lengths()) {
    return;
  }
  // The key that fewest rows see: the first or the last, whichever side has a bound. One of the
  // first is hidden from some rows by any rule.
  const int key = ruled ? s.seqlen_k / 64 : window.allows(0, s.seqlen_k - 1) ? 0 : s.seqlen_k - 1;
  for (int head = 0; head < s.num_heads_kv; ++head) {
    const double huge = problem.dtype == Dtype::kFloat16 ? 60000 : 3e38;
    for (int x = 0; x < s.head_dim; ++x) {
      problem.k.set(0, key, head, x, huge);
    }
    for (int x = 0; x < s.head_dim_v; ++x) {
      problem.v.set(0, key, head, x, huge);
    }
  }
  problem.run(parallel_for<1>);
  for (int row = 0; row < s.seqlen_q; ++row) {
    for (int head = 0; head < s.num_heads; ++head) {
      if (problem.rules.sees(0, head, row, key)) {
        continue;
      }
      const auto same = [&](const Tensor& tensor, int head_dim,
                            const std::vector<unsigned char>& before) {
        const auto* address = static_cast<unsigned char*>(tensor.view.data) +
                              tensor.view.offset(0, row, head) * size_of(problem.dtype);
        return std::memcmp(address, before.data() + (address - tensor.bytes.data()),
                           head_dim * size_of(problem.dtype)) == 0;
      };
      require(
          same(problem.out, s.head_dim_v, results[0]) && same(problem.dq, s.head_dim, results[2]),
          fa::concat("row ", row, " depends on key ", key, ", which it does not see"));
    }
  }
}

// One key has weight 1: the output is its value, for every 16-bit pattern but -0 and NaN.
void check_conversions(Dtype dtype) {
  const Case c = {.shape = {1, 128, 128, 1, 1, 512, 512}};
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
      const Case fixed = {.shape = {4, 4, heads_kv, 130, 195, 24, 24},
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

// Every rule alone and all at once, over every way to broadcast a bias; for either way of dividing
// the backward pass.
std::vector<Case> rules_cases() {
  std::vector<Case> cases;
  for (const int heads_kv : {1, 4}) {
    for (int axes = 0; axes <= kAllAxes; ++axes) {
      cases.push_back({.shape = {4, heads_kv == 1 ? 2 : 4, heads_kv, 70, 131, 5, 9},
                       .right = axes % 3 == 0 ? 0 : -1,
                       .rules = {.bias = axes,
                                 .bias_dtype = kDtypes[(axes + axes / 4) % 4],
                                 .transposed = axes % 2 == 0}});
    }
    const RulesCase rules[] = {
        {.mask = kAllAxes},
        {.mask = kQueryAxis | kKeyAxis, .transposed = true},
        {.padding = kBatchAxis | kKeyAxis},
        {.padding = kHeadAxis | kQueryAxis},
        {.blocks = kHeadAxis | kQueryAxis | kKeyAxis},
        {.blocks = kBatchAxis | kKeyAxis},
        {.document_length = 60},
        {.document_distance = 3},
        {.prefix_lens = {100, 0, 1000, -5}},
        {.bias = kHeadAxis | kQueryAxis | kKeyAxis, .mask = kAllAxes, .padding = kKeyAxis},
        {.bias = kAllAxes,
         .bias_dtype = Dtype::kBFloat16,
         .mask = kHeadAxis | kQueryAxis | kKeyAxis,
         .padding = kBatchAxis | kKeyAxis,
         .blocks = kAllAxes,
         .prefix_lens = {3, 64, 1000, 0},
         .document_length = 90},
    };
    const std::pair<int, int> windows[] = {{-1, -1}, {-1, 0}, {70, 3}};
    int index = heads_kv;
    for (const RulesCase& rule : rules) {
      const auto& [left, right] = windows[++index % 3];
      const int heads = heads_kv == 1 ? 2 : 4;
      cases.push_back({.shape = {4, heads, heads_kv, 150, 200, 5, 3},
                       .left = left,
                       .right = right,
                       .layout = index % 2 == 0 ? Layout::kPadded : Layout::kContiguous,
                       .rules = rule});
      Case packed = cases.back();
      packed.left = -1;
      packed.right = index % 2 - 1;
      packed.queries = {.cu_seqlens = {0, 70, 70, 71, 221}, .foreign_rows = 5};
      packed.keys = {.cu_seqlens = {3, 100, 130, 130, 330}, .seqused = {97, 2, 0, 140}};
      cases.push_back(packed);
    }
  }
  return cases;
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (int seqlen : {1, 63, 64, 65, 95, 96, 97, 127, 129}) {
    cases.push_back({.shape = {1, 2, 2, seqlen, seqlen, 40, 40}, .right = 0});
    cases.push_back({.shape = {1, 2, 1, seqlen, 77, 8, 8}});
    cases.push_back({.shape = {1, 1, 1, 77, seqlen, 5, 5}, .right = 0, .layout = Layout::kPadded});
  }
  for (int head_dim : {1, 5, 40, 64, 80, 128, 512}) {
    cases.push_back({.shape = {1, 2, 1, 65, 66, head_dim, head_dim}, .layout = Layout::kPadded});
    cases.push_back({.shape = {8, 2, 2, 34, 50, head_dim, head_dim}, .right = 0});
  }
  for (const auto& [head_dim, head_dim_v] :
       {std::pair{5, 40}, {64, 8}, {8, 64}, {33, 1}, {512, 3}, {16, 512}}) {
    cases.push_back(
        {.shape = {1, 4, 2, 65, 66, head_dim, head_dim_v}, .right = 0, .layout = Layout::kPadded});
    cases.push_back({.shape = {8, 4, 2, 34, 50, head_dim, head_dim_v}});
  }
  const Case more[] = {
      {.shape = {0, 2, 2, 8, 8, 16, 16}},
      {.shape = {2, 4, 2, 0, 8, 16, 16}},
      {.shape = {2, 4, 2, 8, 0, 16, 16}},
      {.shape = {9, 2, 2, 0, 8, 16, 16}},
      {.shape = {9, 2, 2, 8, 0, 16, 16}, .right = 0},
      {.shape = {2, 8, 2, 130, 130, 64, 64}, .right = 0, .layout = Layout::kHeadsFirst},
      {.shape = {4, 8, 4, 130, 250, 24, 24}, .left = 30, .right = 5, .layout = Layout::kPadded},
      {.shape = {1, 6, 1, 257, 300, 16, 16}, .left = 0, .right = 0},
      {.shape = {1, 6, 1, 300, 257, 16, 16}, .left = 20, .right = -1},
      {.shape = {4, 4, 4, 200, 70, 32, 32}, .right = 0},  // rows that see no key
      {.shape = {1, 2, 2, 70, 200, 32, 32}, .left = 0, .right = 100},
      {.shape = {1, 2, 2, 70, 90, 64, 64}, .size = 100},              // scores to 1e5
      {.shape = {8, 2, 2, 70, 90, 64, 64}, .right = 0, .size = 100},  // the same, task by head
      {.shape = {1, 2, 2, 70, 90, 32, 32}, .right = 0, .scale = -0.5},
  };
  cases.insert(cases.end(), std::begin(more), std::end(more));
  const std::vector<Case> varlen = varlen_cases();
  cases.insert(cases.end(), varlen.begin(), varlen.end());
  const std::vector<Case> rules = rules_cases();
  cases.insert(cases.end(), rules.begin(), rules.end());
  return cases;
}

// Tiles in which nothing is seen are not even read: NaN in hidden keys' rows changes no bit.
void check_skipped_tiles(Dtype dtype, const RulesCase& rules, int heads_kv) {
  const Case c = {.shape = {4, 4, heads_kv, 384, 384, 8, 8}, .left = 300, .rules = rules};
  Problem problem(dtype, c);
  // Everything but the keys from 128 to 256 sees everything but them.
  for (ScoreArray* mask : {&problem.rules.masks[0], &problem.rules.masks[1]}) {
    const int block = mask == &problem.rules.masks[0] ? 1 : 128;
    mask->for_each([&](int b, int h, int i, int j) {
      mask->bytes[mask->index(b, h, i, j)] = j * block / 128 != 1;
    });
  }
  problem.run(parallel_for<1>);
  const auto results = problem.results();
  for (int b = 0; b < 4; ++b) {
    for (int key = 128; key < 256; ++key) {
      for (int head = 0; head < heads_kv; ++head) {
        for (int x = 0; x < 8; ++x) {
          problem.k.set(b, key, head, x, NAN);
          problem.v.set(b, key, head, x, NAN);
        }
      }
    }
  }
  problem.run(parallel_for<1>);
  require(problem.results() == results, "a hidden tile was read");
}

void run_case(Dtype dtype, const Case& c) {
  Problem problem(dtype, c);
  problem.with_dlse = c.shape.head_dim != 40 && c.shape.head_dim != 5;
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
      for (const int heads_kv : {1, 4}) {
        attempt(where + "hidden tiles", [&] {
          check_skipped_tiles(dtype, {.bias = kAllAxes, .mask = kAllAxes}, heads_kv);
          check_skipped_tiles(dtype, {.mask = kKeyAxis}, heads_kv);
          check_skipped_tiles(dtype, {.blocks = kQueryAxis | kKeyAxis}, heads_kv);
        });
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
