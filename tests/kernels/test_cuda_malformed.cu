// SPDX-License-Identifier: BSD-3-Clause
// Whatever cu_seqlens, lengths, documents, prefixes and masks hold, the CUDA kernels end, write no
// row that does not count and read none; and under compute-sanitizer's memcheck they stay inside
// their arrays. Returns 0 if all hold, 1 if one does not, 77 without a GPU. Arguments:
//   COUNT          how many random cases; default: 1000
//   --case NUMBER  that one
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <future>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dispatch/registry.h"
#include "support/cuda_check.h"
#include "tests/support/malformed.h"

namespace {

using namespace fa;
using namespace fa::test;

constexpr int kDefaultCount = 1000;
constexpr std::chrono::seconds kLongest{20};  // of a launch

const MalformedLimits kLimits = {
    .dtypes = {Dtype::kBFloat16, Dtype::kFloat16},
    .bias_dtypes = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16},
    .head_dims = {8, 16, 40, 64, 64, 72, 96, 128, 128, 136, 192, 256, 264, 512},
    .layouts = {Layout::kContiguous, Layout::kHeadsFirst},
    .longest = 500,
    .most_pairs = 200000};

int g_case = 0;

void print_how_to_repeat() { std::printf("repeat: test_cuda_malformed --case %d\n", g_case); }

// Blocks that wait for each other may do so forever, and then nothing can be freed.
void wait_for(const std::string& name) {
  auto status = std::async(std::launch::async, [] { return cudaDeviceSynchronize(); });
  if (status.wait_for(kLongest) == std::future_status::timeout) {
    std::printf("FAILED %s still runs after %d seconds\n", name.c_str(),
                static_cast<int>(kLongest.count()));
    print_how_to_repeat();
    std::fflush(stdout);
    std::_Exit(1);
  }
  check_cuda(status.get(), "run ", name);
}

// Copies of arrays of the host, none of them a byte longer.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  ~DeviceMemory() {
    for (void* memory : allocated_) {
      cudaFree(memory);
    }
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // Full of NaN.
  void* allocate(int64_t bytes) {
    if (bytes == 0) {
      return nullptr;
    }
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, bytes), "allocate ", bytes, " bytes");
    allocated_.push_back(memory);
    check_cuda(cudaMemset(memory, kPoison, bytes), "fill memory");
    return memory;
  }

  template <typename T>
  T* place(std::vector<T>& array) {
    const auto [copy, is_new] = copies_.try_emplace(array.data());
    if (is_new) {
      const int64_t bytes = array.size() * sizeof(T);
      copy->second = {allocate(bytes), bytes};
      check_cuda(cudaMemcpy(copy->second.data, array.data(), bytes, cudaMemcpyDefault),
                 "copy to the device");
    }
    return static_cast<T*>(copy->second.data);
  }

  // Of all arrays, to where they came from.
  void fetch() const {
    for (const auto& [array, copy] : copies_) {
      check_cuda(cudaMemcpy(array, copy.data, copy.bytes, cudaMemcpyDefault), "copy to the host");
    }
  }

 private:
  struct Copy {
    void* data = nullptr;
    int64_t bytes = 0;
  };

  std::vector<void*> allocated_;
  std::map<void*, Copy> copies_;  // by where the host has them
};

class MalformedTest {
 public:
  MalformedTest(const MalformedCase& c, const CudaDevice& device)
      : c_(c), problem_(c), draw_(c.number), device_(device) {}

  // At random among those that can run the case.
  int choose_row(Pass pass) {
    HostMemory host;
    const bool has_rules = problem_.forward(host, problem_.shape).rules.any();
    const int head_dim = std::max(c_.shape.head_dim, c_.shape.head_dim_v);
    std::vector<int> rows;
    for (int row = 0; row < kNumRows; ++row) {
      const KernelConfig& config = table::kRows[row];
      const bool is_of_gpu = config.family == Family::kSm80 ||
                             (config.family == Family::kSm90 && device_.compute_capability == 90);
      if (is_of_gpu && config.pass == pass && config.dtype == c_.dtype &&
          config.head_dim >= head_dim && (config.score == ScoreMode::kGeneral || !has_rules) &&
          config.smem_bytes() <= device_.smem_opt_in && registry().kernels[row].present()) {
        rows.push_back(row);
      }
    }
    check(!rows.empty(), ErrorKind::kRuntime, "no row runs the case");
    return draw_.one_of(rows);
  }

  // But for an empty one, which the API launches nothing for.
  void run_forward(int row) {
    if (problem_.lse.empty()) {
      return;
    }
    const KernelConfig& config = table::kRows[row];
    DeviceMemory memory;
    clean(memory);
    FwdParams params = problem_.forward(memory, problem_.shape);
    add_tile_map(memory, config, params);
    add_pair_bits(memory, config, params);
    registry().kernels[row].forward(params, {});
    wait_for(config.name());
    fetch(memory);
    name_in_errors(config.name(), [this] { problem_.check_forward(); });
  }

  void run_backward(int row, bool deterministic) {
    if (problem_.dq.bytes.empty() && problem_.dk.bytes.empty()) {
      return;
    }
    const KernelConfig& config = table::kRows[row];
    DeviceMemory memory;
    problem_.clear_gradients();
    clean(memory);
    BwdParams params = problem_.backward(memory, problem_.shape);
    add_tile_map(memory, config, params);
    add_pair_bits(memory, config, params);
    const int64_t tiles = tiles_of(params, config);
    const int heads = params.shape.num_heads;
    const int64_t floats =
        BwdWorkspace::floats(tiles * heads, config.tile_m, config.head_dim, deterministic);
    params.workspace =
        BwdWorkspace::in(static_cast<float*>(memory.allocate(floats * sizeof(float))), heads, tiles,
                         config.tile_m, config.head_dim, deterministic);
    const std::string name = config.name() + (deterministic ? ", deterministic" : "");
    registry().kernels[row].backward(params, {});
    wait_for(name);
    fetch(memory);
    name_in_errors(name, [this] { problem_.check_backward(); });
  }

 private:
  void clean(DeviceMemory& memory) {
    if (c_.has_sequences()) {
      const GivenSequences queries = problem_.queries.given(memory);
      const GivenSequences keys = problem_.keys.given(memory);
      registry().clean_sequences_on_cuda(&queries, &keys, nullptr);
      wait_for("clean_sequences");
    }
  }

  void fetch(const DeviceMemory& memory) {
    memory.fetch();
    if (c_.has_sequences()) {
      for (auto [on_device, on_host] : {std::pair{&problem_.queries, &problem_.clean_queries},
                                        std::pair{&problem_.keys, &problem_.clean_keys}}) {
        require(on_device->clean_cu_seqlens == on_host->clean_cu_seqlens &&
                    on_device->clean_seqused == on_host->clean_seqused,
                "sequences are cleaned otherwise than on the host");
        on_device->forget();
      }
    }
  }

  // As api/attention.cpp allocates it.
  template <typename Params>
  void add_tile_map(DeviceMemory& memory, const KernelConfig& config, Params& params) {
    if (!params.rules.has_data_masks()) {
      return;
    }
    const int64_t query_tiles = tiles_of(params, config);
    const int key_tiles = ceil_div(params.shape.seqlen_k, config.tile_n);
    bool differs = false;
    for (const KeepMask& mask : params.rules.masks) {
      differs |= mask.head_stride != 0;
    }
    const int64_t bytes = (differs ? params.shape.num_heads : 1) * query_tiles * key_tiles;
    params.tile_map = {static_cast<TileClass*>(memory.allocate(bytes)),
                       differs ? query_tiles * key_tiles : 0, key_tiles};
  }

  template <typename Params>
  void add_pair_bits(DeviceMemory& memory, const KernelConfig& config, Params& params) {
    if (config.reads_pair_bits()) {
      params.pair_bits = pair_bits_of(params, config.tile_m, config.tile_n);
      const int64_t bytes = params.pair_bits.bytes();
      params.pair_bits.words =
          bytes == 0 ? nullptr : static_cast<uint32_t*>(memory.allocate(bytes));
    }
  }

  template <typename Params>
  static int64_t tiles_of(const Params& params, const KernelConfig& config) {
    return params.queries.count_tiles(params.shape.batch, params.queries.packed_rows,
                                      params.shape.seqlen_q, config.tile_m);
  }

  template <typename Check>
  static void name_in_errors(const std::string& name, const Check& check) {
    try {
      check();
    } catch (const std::exception& error) {
      throw std::runtime_error(name + ": " + error.what());
    }
  }

  const MalformedCase& c_;
  MalformedProblem problem_;
  Draw draw_;
  const CudaDevice& device_;
};

void run_case(const MalformedCase& c, const CudaDevice& device, std::set<int>& rows_run) {
  MalformedTest test(c, device);
  const int forward = test.choose_row(Pass::kForward);
  const int backward = test.choose_row(Pass::kBackward);
  rows_run.insert({forward, backward});
  test.run_forward(forward);
  test.run_backward(backward, /*deterministic=*/false);
  test.run_backward(backward, /*deterministic=*/true);
}

// The exit status.
int run_cases(int first, int count) {
  const CudaDevice device = registry().query_cuda_device(0);
  std::set<int> rows_run;
  int failures = 0;
  for (g_case = first; g_case < first + count; ++g_case) {
    const MalformedCase c(g_case, kLimits);
    try {
      run_case(c, device, rows_run);
    } catch (const std::exception& error) {
      ++failures;
      std::printf("FAILED %s\n  %s\n", error.what(), c.describe().c_str());
      print_how_to_repeat();
      std::fflush(stdout);
      if (cudaDeviceSynchronize() != cudaSuccess) {
        break;  // after an access out of bounds nothing runs any more
      }
    }
  }
  std::printf("%d cases on %d rows of the kernel table, %d failures\n", count,
              static_cast<int>(rows_run.size()), failures);
  return count > 0 && failures == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no GPU\n");
    return 77;
  }
  if (argc == 3 && std::string(argv[1]) == "--case") {
    return run_cases(std::atoi(argv[2]), 1);
  }
  return run_cases(0, argc == 2 ? std::atoi(argv[1]) : kDefaultCount);
}
