// SPDX-License-Identifier: BSD-3-Clause
// Every CUDA row of the kernel table, through the registry, against a naive reference in double, on
// the cases of tests/support/cuda_cases.h. Prints a line per row, a line per failure and a summary.
// Returns 0 if all hold, 1 if one does not, 77 without a GPU. Arguments, in any order:
//   --small       only the small cases, for a checker that slows kernels down
//   many          also a case of more work items than a launch has blocks
//   anything else only rows whose name contains it
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <future>
#include <string>
#include <type_traits>
#include <vector>

#include "dispatch/registry.h"
#include "support/launch.cuh"
#include "tests/support/cuda_problem.h"

namespace {

using namespace fa;
using namespace fa::test;

static_assert(int64_t{1100} * 1024 > support::kMaxBlocks, "the case `many` fits one launch");

struct Options {
  std::string filter;
  bool small = false;
  bool many = false;
};

int g_failures = 0;
int g_checks = 0;

void fail(const KernelConfig& config, const Case& test, const std::string& what) {
  ++g_failures;
  std::printf("FAILED %s, case %s, head_dim %d: %s\n", config.name().c_str(), test.name,
              test.shape.head_dim, what.c_str());
}

// Blocks that wait for each other may do so forever, and then nothing can be freed.
void wait_for(const KernelConfig& config, const Case& test) {
  auto status = std::async(std::launch::async, [] { return cudaDeviceSynchronize(); });
  if (status.wait_for(std::chrono::minutes(1)) == std::future_status::timeout) {
    fail(config, test, "still runs after a minute");
    std::fflush(stdout);
    std::_Exit(1);
  }
  check_cuda(status.get(), "run ", config.name(), " on case ", test.name);
}

// Errors relative to what is typical of all elements, and at worst, of an element relative to what
// is typical of its row too. NaN is never within a bound. Where the reference nearly vanishes a
// hundredth is typical.
struct Errors {
  double typical = 0;
  double largest = 0;
};

double root_mean_square(const double* values, size_t count) {
  double sum = 0;
  for (size_t i = 0; i < count; ++i) {
    sum += values[i] * values[i];
  }
  return std::sqrt(sum / static_cast<double>(count));
}

Errors errors_of(const std::vector<double>& actual, const std::vector<double>& expected, int cols) {
  Errors errors;
  if (expected.empty()) {
    return errors;
  }
  std::vector<double> differences(expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    differences[i] = actual[i] - expected[i];
  }
  const double typical = root_mean_square(expected.data(), expected.size()) + 0.01;
  errors.typical = root_mean_square(differences.data(), differences.size()) / typical;
  for (size_t row = 0; row < expected.size(); row += cols) {
    const double typical_of_row = typical + root_mean_square(&expected[row], cols);
    for (int col = 0; col < cols; ++col) {
      const double error = std::abs(differences[row + col]) / typical_of_row;
      errors.largest = error <= errors.largest ? errors.largest : error;
    }
  }
  return errors;
}

// The largest of many elements errs by several times what is typical.
constexpr double kLargest = 15;

template <typename T>
void compare(const KernelConfig& config, const Case& test, const std::string& name,
             const DeviceTensor<T>& actual, const std::vector<double>& expected, int cols,
             double bound) {
  ++g_checks;
  const std::vector<T> downloaded = actual.download();
  std::vector<double> values(expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    values[i] = static_cast<float>(downloaded[actual.placement().elements[i]]);
  }
  const Errors errors = errors_of(values, expected, cols);
  if (!(errors.typical < bound && errors.largest < kLargest * bound)) {
    fail(config, test,
         concat(name, " has relative error ", errors.typical, ", at worst ", errors.largest));
  }
  if (!actual.gaps_hold(downloaded)) {
    fail(config, test, name + ": wrote outside");
  }
}

// What is left of errors of scores, which are proportional to them: with float32 inputs they show,
// since products are as exact as float32 or round their factors; 16-bit factors are exact.
double lse_bound(const KernelConfig& config, const Case& test, double lse) {
  switch (config.dtype) {
    case Dtype::kFloat32:
      return 1e-5 * test.magnitude + 1e-6 * std::abs(lse);
    case Dtype::kTf32:
      return 4e-3 * test.magnitude + 1e-3 * std::abs(lse);
    default:
      return 1e-4 + 1e-5 * std::abs(lse);
  }
}

void compare_lse(const KernelConfig& config, const Case& test, const DeviceTensor<float>& lse,
                 const std::vector<double>& expected) {
  ++g_checks;
  const std::vector<float> downloaded = lse.download();
  for (size_t i = 0; i < expected.size(); ++i) {
    const double actual = downloaded[lse.placement().elements[i]];
    const double bound = lse_bound(config, test, expected[i]);
    if (!(actual == expected[i] || std::abs(actual - expected[i]) <= bound)) {
      fail(config, test,
           concat("lse of row and head ", i, " is ", actual, " instead of ", expected[i]));
      break;
    }
  }
  if (!lse.gaps_hold(downloaded)) {
    fail(config, test, "lse: wrote outside");
  }
}

// Sums of all queries of a head, in which what the rounding of out does to delta adds up.
constexpr double kSlackOfHeads = 2;

void compare_of_heads(const KernelConfig& config, const Case& test, const std::string& name,
                      const std::vector<float>& actual, const std::vector<double>& expected,
                      double bound) {
  ++g_checks;
  const Errors errors = errors_of({actual.begin(), actual.end()}, expected, 1);
  if (!(errors.typical < kSlackOfHeads * bound && errors.largest < kLargest * bound)) {
    fail(config, test,
         concat(name, " has relative error ", errors.typical, ", at worst ", errors.largest));
  }
}

// Exact but for rounding.
void compare_max_logit(const KernelConfig& config, const Case& test,
                       const std::vector<float>& actual, const std::vector<double>& expected) {
  ++g_checks;
  for (size_t head = 0; head < expected.size(); ++head) {
    const double bound = 1e-4 + 1e-5 * std::abs(expected[head]);
    if (!(actual[head] == expected[head] || std::abs(actual[head] - expected[head]) <= bound)) {
      fail(config, test,
           concat("largest score of head ", head, " is ", actual[head], " instead of ",
                  expected[head]));
      break;
    }
  }
}

// Of results of a dtype, and of products of such factors: inputs of 16 bits are exact ones.
double bound_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return 1e-2;
    case Dtype::kTf32:
      return 1e-2;
    case Dtype::kFloat32:
      return 6e-6;
    default:
      return 2e-3;
  }
}

double bound_of(const KernelConfig& config, const Case& test) {
  const bool scores_err = tensor_dtype(config.dtype) == Dtype::kFloat32;  // as of lse_bound()
  return bound_of(config.dtype) * (scores_err ? test.magnitude : 1.0);
}

template <typename Element>
void run_forward(int row, const Problem<Element>& problem) {
  const KernelConfig& config = table::kRows[row];
  DeviceTensor<Element> out(problem.of_out);
  DeviceTensor<float> lse(problem.of_statistics);
  const DeviceTileMap map(problem.shape, problem.queries, problem.rules.view(), config.tile_m,
                          config.tile_n);
  FwdParams params = problem.forward(out, lse, map.view());
  const DevicePairBits pair_bits(params, config);
  params.pair_bits = pair_bits.view();
  const bool needs_max_logit = problem.test.rules.terms.max_logit;
  DeviceArray<float> max_logit(needs_max_logit ? problem.shape.num_heads : 0);
  if (needs_max_logit) {
    max_logit.upload(std::vector<float>(problem.shape.num_heads, -INFINITY));
    params.rules.terms.max_logit = {max_logit.data(), 0, 1};
  }
  registry().kernels[row].forward(params, {});
  wait_for(config, problem.test);
  compare(config, problem.test, "out", out, problem.expected.out, problem.shape.head_dim_v,
          bound_of(config, problem.test));
  if (!map.guards_hold() || !pair_bits.guards_hold() || !max_logit.guards_hold()) {
    fail(config, problem.test, "tile map, pair bits or largest scores: wrote outside");
  }
  if (needs_max_logit) {
    compare_max_logit(config, problem.test, max_logit.download(), problem.expected.max_logit);
  }
  compare_lse(config, problem.test, lse, problem.expected.lse);
}

bool same_bits(const auto& a, const auto& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0);
}

template <typename Element>
class BackwardTest {
 public:
  BackwardTest(int row, const Problem<Element>& problem)
      : row_(row),
        problem_(problem),
        dq_(problem.of_q),
        dk_(problem.of_k),
        dv_(problem.of_v),
        dbias_(problem.host_rules.bias_entries().count * problem.rules.bytes_of_bias()) {}

  void run() {
    run_pass(false);
    const std::vector<Element> dk = dk_.download();
    const std::vector<Element> dv = dv_.download();
    const std::vector<uint8_t> dbias = dbias_.download();
    run_pass(true);
    if (!same_bits(dbias, dbias_.download())) {
      fail(config(), test(), "dbias depends on the order of dq");
    }
    if (!same_bits(dk, dk_.download()) || !same_bits(dv, dv_.download())) {
      fail(config(), test(), "dk or dv depends on the order of dq");
    }
  }

 private:
  const KernelConfig& config() const { return table::kRows[row_]; }
  const Case& test() const { return problem_.test; }

  void run_pass(bool deterministic) {
    const Shape& shape = problem_.shape;
    const int64_t tiles = problem_.queries.tiles(shape.seqlen_q, config().tile_m);
    const int64_t floats = BwdWorkspace::floats(shape.num_heads * tiles, config().tile_m,
                                                config().head_dim, deterministic);
    size_t available = 0;
    size_t total = 0;
    check_cuda(cudaMemGetInfo(&available, &total), "tell how much memory is free");
    if (floats * sizeof(float) > available - available / 8) {
      std::printf("skipped %s, case %s: not enough memory\n", config().name().c_str(), test().name);
      return;
    }
    DeviceArray<float> memory(floats);
    const auto workspace = BwdWorkspace::in(memory.data(), shape.num_heads, tiles, config().tile_m,
                                            config().head_dim, deterministic);
    const DeviceTileMap map(shape, problem_.queries, problem_.rules.view(), config().tile_m,
                            config().tile_n);
    const ScoreTensor dbias =
        test().rules.has_dbias()
            ? DeviceRules::tensor(problem_.host_rules.bias_entries(), dbias_.data())
            : ScoreTensor{};
    const HostRules& rules = problem_.host_rules;
    const DeviceHeadGradient dslopes(rules.slopes().size(), rules.slope_strides(), shape.num_heads,
                                     problem_.keys.tiles(shape.seqlen_k, config().tile_n));
    const DeviceHeadGradient dsinks(rules.sinks().size(), {nullptr, 0, 1}, shape.num_heads, tiles);
    BwdParams params = problem_.backward(dq_, dk_, dv_, workspace, map.view(), dbias,
                                         dslopes.view(), dsinks.view());
    const DevicePairBits pair_bits(params, config());
    params.pair_bits = pair_bits.view();
    std::vector<Element> dq;
    for (int repeat = 0; repeat < (deterministic ? test().repeats : 1); ++repeat) {
      memory.poison();
      for (DeviceTensor<Element>* gradient : {&dq_, &dk_, &dv_}) {
        gradient->poison();
      }
      clear_dbias();
      registry().kernels[row_].backward(params, {});
      wait_for(config(), test());
      const std::vector<Element> repeated = dq_.download();
      if (repeat > 0 && !same_bits(dq, repeated)) {
        fail(config(), test(), concat("dq differs in run ", repeat));
      }
      dq = repeated;
    }
    const std::string mode = deterministic ? " (deterministic)" : "";
    const double bound = bound_of(config(), test()) * test().gradient_slack;
    const Reference& expected = problem_.expected;
    compare(config(), test(), "dq" + mode, dq_, expected.dq, shape.head_dim, bound);
    compare(config(), test(), "dk" + mode, dk_, expected.dk, shape.head_dim, bound);
    compare(config(), test(), "dv" + mode, dv_, expected.dv, shape.head_dim_v, bound);
    compare_dbias(mode, bound);
    compare_of_heads(config(), test(), "dslopes" + mode, dslopes.download(), expected.dslopes,
                     bound);
    compare_of_heads(config(), test(), "dsinks" + mode, dsinks.download(), expected.dsinks, bound);
    if (!dslopes.guards_hold() || !dsinks.guards_hold()) {
      fail(config(), test(), "dslopes or dsinks" + mode + ": wrote outside");
    }
    if (!same_bits(dslopes.download(), dslopes_) && deterministic) {
      fail(config(), test(), "dslopes depend on the order of dq");
    }
    dslopes_ = dslopes.download();
    if (!memory.guards_hold() || !map.guards_hold() || !pair_bits.guards_hold()) {
      fail(config(), test(), "workspace" + mode + ": wrote outside");
    }
  }

  // Zero where the bias has entries, poison in the gaps.
  void clear_dbias() {
    if (test().rules.has_dbias()) {
      dbias_.upload(problem_.rules.bytes_of(std::vector<double>(entries().size()), entries()));
    }
  }

  void compare_dbias(const std::string& mode, double bound) {
    if (!test().rules.has_dbias()) {
      return;
    }
    ++g_checks;
    const size_t size = problem_.rules.bytes_of_bias();
    const std::vector<uint8_t> bytes = dbias_.download();
    std::vector<double> actual;
    std::vector<double> expected;
    bool gaps_hold = dbias_.guards_hold();
    for (size_t i = 0; i < entries().size(); ++i) {
      const uint8_t* entry = &bytes[i * size];
      if (entries()[i]) {
        actual.push_back(problem_.rules.number_of(entry));
        expected.push_back(problem_.expected.dbias[i]);
      } else {
        gaps_hold &= std::all_of(entry, entry + size, [](int byte) { return byte == kPoison; });
      }
    }
    bound = std::max(bound, bound_of(problem_.rules.dtype_of_bias()));
    const Errors errors = errors_of(actual, expected, 1);
    if (!(errors.typical < bound && errors.largest < kLargest * bound)) {
      fail(config(), test(),
           concat("dbias", mode, " has relative error ", errors.typical, ", at worst ",
                  errors.largest));
    }
    if (!gaps_hold) {
      fail(config(), test(), "dbias" + mode + ": wrote outside");
    }
  }

  const std::vector<bool>& entries() const { return problem_.bias_entries; }

  int row_;
  const Problem<Element>& problem_;
  DeviceTensor<Element> dq_, dk_, dv_;
  DeviceArray<uint8_t> dbias_;
  std::vector<float> dslopes_;  // of the pass before
};

// Which rows are to be tested.
std::vector<int> select_rows(const Options& options, const CudaDevice& device) {
  std::vector<int> rows;
  for (int row = 0; row < kNumRows; ++row) {
    const KernelConfig& config = table::kRows[row];
    const std::string name = config.name();
    const bool other_gpu = config.family == Family::kSm90 &&
                           (device.compute_capability != 90 || !registry().kernels[row].present());
    if (config.family == Family::kCpu || other_gpu ||
        name.find(options.filter) == std::string::npos) {
      continue;
    }
    const RegisteredKernel& kernel = registry().kernels[row];
    check(kernel.present(), ErrorKind::kRuntime, name, " is not in this build");
    const KernelResources r = kernel.resources();
    const bool fits = config.smem_bytes() <= device.smem_opt_in;
    std::printf(
        "%s, %d warps, %d blocks: %d registers, %lld local, %lld static and %lld dynamic "
        "shared memory%s\n",
        name.c_str(), config.warps, config.blocks, r.registers,
        static_cast<long long>(r.local_bytes), static_cast<long long>(r.static_smem_bytes),
        static_cast<long long>(r.dynamic_smem_bytes), fits ? "" : ", skipped: too much");
    if (fits) {
      rows.push_back(row);
    }
  }
  return rows;
}

// Every head_dim of the CUDA families for tensors of as many bits, ascending.
std::vector<int> head_dims(Dtype dtype) {
  std::vector<int> result;
  for (const KernelConfig& config : table::kRows) {
    if (config.family != Family::kCpu && bytes_of(config.dtype) == bytes_of(dtype)) {
      result.push_back(config.head_dim);
    }
  }
  std::sort(result.begin(), result.end());
  result.erase(std::unique(result.begin(), result.end()), result.end());
  return result;
}

bool runs(const KernelConfig& config, const Case& test) {
  const Shape& shape = test.shape;
  const std::vector<int> all = head_dims(config.dtype);
  const int head_dim = std::max(shape.head_dim, shape.head_dim_v);
  const auto nearest = std::lower_bound(all.begin(), all.end(), head_dim);
  const bool full = (test.left < 0 && test.right < 0);
  if (config.score == ScoreMode::kPlain && test.rules.any()) {
    return false;
  }
  const TermSpec& terms = test.rules.terms;
  if (terms.softcap != 0 && !config.has_softcap()) {
    return false;
  }
  return nearest != all.end() && (config.mask == MaskMode::kWindow || full) &&
         (test.every_row ? config.head_dim >= *nearest : config.head_dim == *nearest);
}

template <typename Element>
constexpr Dtype kDtypeOf = std::is_same_v<Element, __nv_bfloat16> ? Dtype::kBFloat16
                           : std::is_same_v<Element, __half>      ? Dtype::kFloat16
                                                                  : Dtype::kFloat32;

template <typename Element>
void run_problem(const std::vector<int>& rows, const Case& test) {
  std::vector<int> chosen;
  for (const int row : rows) {
    if (tensor_dtype(table::kRows[row].dtype) == kDtypeOf<Element> &&
        runs(table::kRows[row], test)) {
      chosen.push_back(row);
    }
  }
  if (chosen.empty()) {
    return;
  }
  const Problem<Element> problem(test);
  for (const int row : chosen) {
    if (table::kRows[row].pass == Pass::kForward) {
      run_forward(row, problem);
    } else {
      BackwardTest<Element>(row, problem).run();
    }
  }
}

template <typename Element>
void run_dtype(const std::vector<int>& rows, Case test) {
  const bool of_row = test.shape.head_dim == kOfRow;
  const int head_dim_v = test.shape.head_dim_v;
  for (const int head_dim :
       of_row ? head_dims(kDtypeOf<Element>) : std::vector<int>{test.shape.head_dim}) {
    test.shape.head_dim = head_dim;
    test.shape.head_dim_v = head_dim_v == 0 ? head_dim : head_dim_v;
    run_problem<Element>(rows, test);
  }
}

void run_case(const std::vector<int>& rows, const Case& test) {
  run_dtype<__nv_bfloat16>(rows, test);
  run_dtype<__half>(rows, test);
  run_dtype<float>(rows, test);
}

void run(const Options& options) {
  const CudaDevice device = registry().query_cuda_device(0);
  std::printf("compute capability %d, %lld bytes of shared memory, CUDA %d\n",
              device.compute_capability, static_cast<long long>(device.smem_opt_in),
              registry().cuda_version);
  const std::vector<int> rows = select_rows(options, device);
  check(!rows.empty(), ErrorKind::kValue, "no row's name contains ", options.filter);
  for (const Case& test : all_cases()) {
    if (test.small || !options.small) {
      run_case(rows, test);
    }
  }
  if (options.many) {
    run_case(rows, kManyWorkItems);
  }
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no GPU\n");
    return 77;
  }
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--small") {
      options.small = true;
    } else if (argument == "many") {
      options.many = true;
    } else {
      options.filter = argument;
    }
  }
  try {
    run(options);
  } catch (const std::exception& error) {
    std::printf("FAILED %s\n", error.what());
    return 1;
  }
  std::printf("%d comparisons, %d failures\n", g_checks, g_failures);
  return g_failures == 0 ? 0 : 1;
}
