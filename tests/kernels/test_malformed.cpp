// SPDX-License-Identifier: BSD-3-Clause
// Whatever cu_seqlens, lengths, documents, prefixes and masks hold, the CPU kernels stay inside
// their arrays, write no row that does not count and read none: for AddressSanitizer, which sees
// any access outside. Arguments:
//   COUNT          how many random cases; default: 10000
//   --case NUMBER  that one
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "tests/support/malformed.h"

// Asked by sanitizers where the program has them.
extern "C" const char* __asan_default_options() { return "abort_on_error=1"; }
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1"; }

namespace {

using namespace fa::test;
using fa::Dtype;
using fa::Pass;
using fa::Shape;

constexpr int kDefaultCount = 10000;

const MalformedLimits kLimits = {
    .dtypes = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat64},
    .bias_dtypes = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat64},
    .head_dims = {1, 2, 3, 5, 8, 17},
    .layouts = {Layout::kContiguous, Layout::kHeadsFirst, Layout::kPadded},
    .longest = 150,
    .most_pairs = 12000};

int g_case = 0;

void print_how_to_repeat() { std::fprintf(stderr, "repeat: test_malformed --case %d\n", g_case); }

void run_on_one_thread(int64_t begin, int64_t end, int64_t,
                       void (*body)(int64_t begin, int64_t end, void* context), void* context) {
  body(begin, end, context);
}

const fa::RegisteredKernel& kernel(Pass pass, Dtype dtype) {
  for (int row = 0; row < fa::kNumRows; ++row) {
    const fa::KernelConfig& config = fa::table::kRows[row];
    if (config.family == fa::Family::kCpu && config.pass == pass && config.dtype == dtype) {
      return fa::registry().kernels[row];
    }
  }
  throw std::runtime_error("no kernel");
}

void run_case(const MalformedCase& c) {
  MalformedProblem problem(c);
  HostMemory memory;
  Shape shape = problem.shape;
  if (c.has_sequences()) {
    fa::clean_sequences(problem.queries.given(memory));
    fa::clean_sequences(problem.keys.given(memory));
    shape.seqlen_q = problem.queries.longest_of_all();
    shape.seqlen_k = problem.keys.longest_of_all();
  }
  const fa::LaunchContext context = {.parallel_for = run_on_one_thread};
  kernel(Pass::kForward, c.dtype).forward(problem.forward(memory, shape), context);
  problem.check_forward();
  problem.clear_gradients();
  fa::BwdParams params = problem.backward(memory, shape);
  params.delta = problem.statistics(memory, problem.delta);
  kernel(Pass::kBackward, c.dtype).backward(params, context);
  problem.check_backward();
  problem.check_statistics("delta", problem.delta);
}

// The exit status.
int run_cases(int first, int count) {
  const std::vector<std::string> isas = fa::cpu::available_isas();
  int failures = 0;
  for (g_case = first; g_case < first + count; ++g_case) {
    const MalformedCase c(g_case, kLimits);
    const std::string& isa = isas[g_case % isas.size()];
    fa::cpu::select_isa(isa);
    try {
      run_case(c);
    } catch (const std::exception& error) {
      ++failures;
      std::fprintf(stderr, "FAILED %s: %s\n  %s\n", isa.c_str(), error.what(),
                   c.describe().c_str());
      print_how_to_repeat();
    }
  }
  std::printf("%d cases, %d failures\n", count, failures);
  return count > 0 && failures == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGABRT, [](int) { print_how_to_repeat(); });
  if (argc == 3 && std::string(argv[1]) == "--case") {
    return run_cases(std::atoi(argv[2]), 1);
  }
  return run_cases(0, argc == 2 ? std::atoi(argv[1]) : kDefaultCount);
}
