// SPDX-License-Identifier: BSD-3-Clause
// Every sm80 row of the kernel table, forward and backward, through the registry, against a naive
// reference in double. All memory around and between the rows is NaN (inputs) or a canary
// (outputs). Prints a line per case that fails and a summary; returns 0 if all hold, 1 if one does
// not, 77 without a GPU. Arguments: "many" adds a case of more work items than blocks.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "dispatch/registry.h"
#include "support/cuda_check.h"

namespace {

using namespace fa;

enum class Layout { kPacked, kPadded, kHeadsFirst };

struct Case {
  const char* name;
  int batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim;
  int left, right;     // -1: unbounded
  double scale = 0.0;  // 0: 1 / sqrt(head_dim)
  Layout layout = Layout::kPadded;
  float magnitude = 1.0f;  // of q
  bool dlse = false;
  bool zero_scale = false;

  bool full() const { return left < 0 && right < 0; }
  double softmax_scale() const {
    return zero_scale ? 0.0 : scale != 0.0 ? scale : 1.0 / std::sqrt(head_dim);
  }
};

constexpr Case kCases[] = {
    {"one", 1, 1, 1, 1, 1, 8, -1, -1},
    {"tile", 1, 1, 1, 64, 64, 64, -1, -1},
    {"tile d128", 1, 1, 1, 64, 64, 128, -1, -1},
    {"tails 63 65", 2, 2, 2, 63, 65, 40, -1, -1},
    {"tails 127 1", 1, 2, 1, 127, 1, 64, -1, -1},
    {"tails 1 127", 2, 4, 2, 1, 127, 96, -1, -1},
    {"tails 65 129", 2, 4, 1, 65, 129, 128, -1, -1, 0, Layout::kHeadsFirst},
    {"d72", 1, 4, 2, 130, 200, 72, -1, -1},
    {"packed", 2, 2, 2, 100, 70, 64, -1, -1, 0, Layout::kPacked},
    {"causal 127 63", 2, 2, 2, 127, 63, 64, -1, 0},
    {"causal 65 191", 2, 4, 2, 65, 191, 128, -1, 0},
    {"causal 200 200", 1, 4, 1, 200, 200, 64, -1, 0, 0, Layout::kHeadsFirst},
    {"causal 129 40 d8", 1, 2, 2, 129, 40, 8, -1, 0},
    {"window 7 3", 2, 4, 2, 130, 150, 40, 7, 3},
    {"window 7 3 d96", 1, 4, 4, 150, 130, 96, 7, 3},
    {"window 0 0", 1, 2, 1, 70, 70, 128, 0, 0},
    {"window 100 right", 1, 2, 1, 190, 190, 64, 100, -1},
    {"window sees nothing", 1, 2, 1, 300, 20, 72, 2, 1},
    {"no keys", 2, 2, 1, 70, 0, 64, -1, -1},
    {"no keys causal", 1, 2, 2, 70, 0, 128, -1, 0},
    {"no queries", 1, 2, 2, 0, 70, 64, -1, -1},
    {"large scores", 1, 2, 2, 66, 130, 64, -1, -1, 0, Layout::kPadded, 20.0f},
    {"large scores causal", 1, 2, 2, 66, 130, 128, -1, 0, 0, Layout::kPadded, 20.0f},
    {"dlse", 2, 4, 2, 100, 90, 64, -1, -1, 0, Layout::kPadded, 1.0f, true},
    {"dlse causal", 2, 4, 2, 100, 90, 96, -1, 0, 0, Layout::kPadded, 1.0f, true},
    {"negative scale", 1, 2, 2, 70, 90, 64, 40, 0, -0.2},
    {"zero scale", 1, 2, 2, 70, 90, 64, 40, 0, 0, Layout::kPadded, 1.0f, false, true},
};
constexpr Case kManyWorkItems = {"many", 1100, 1024, 1024, 1, 1, 8, -1, -1, 0, Layout::kPacked};

int g_failures = 0;
int g_checks = 0;

void fail(const KernelConfig& config, const Case& test, const std::string& what) {
  ++g_failures;
  std::printf("FAILED %s, %s: %s\n", config.name().c_str(), test.name, what.c_str());
}

template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t count) : host(count) {
    check_cuda(cudaMalloc(&data, std::max<size_t>(count, 1) * sizeof(T)), "allocate");
    std::memset(static_cast<void*>(host.data()), 0xff, count * sizeof(T));  // NaN in every type
  }
  ~DeviceBuffer() { cudaFree(data); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  void upload() {
    check_cuda(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyDefault), "copy");
  }
  void download() {
    check_cuda(cudaMemcpy(host.data(), data, host.size() * sizeof(T), cudaMemcpyDefault), "copy");
  }
  std::vector<T> host;
  T* data = nullptr;
};

// A (batch, seqlen, heads, head_dim) tensor in NaN surroundings.
template <typename Element>
class Tensor {
 public:
  Tensor(const Case& test, int seqlen, int heads)
      : batch_(test.batch),
        seqlen_(seqlen),
        heads_(heads),
        head_dim_(test.head_dim),
        view_(strides(test, seqlen, heads)),
        buffer(static_cast<size_t>(view_.batch_stride) * test.batch) {
    view_.data = buffer.data;
  }

  template <typename Generator>
  void randomize(Generator& generator, float magnitude) {
    std::normal_distribution<float> normal;
    each([&](int64_t offset, size_t) {
      buffer.host[offset] = static_cast<Element>(magnitude * normal(generator));
    });
    buffer.upload();
  }

  // Elements in (batch, seqlen, heads, head_dim) order.
  std::vector<double> values() const {
    std::vector<double> result(static_cast<size_t>(batch_) * seqlen_ * heads_ * head_dim_);
    each([&](int64_t offset, size_t i) { result[i] = static_cast<float>(buffer.host[offset]); });
    return result;
  }

  // True if nothing but the tensor's own elements was written since the buffer was made.
  bool surroundings_untouched() const {
    std::vector<bool> own(buffer.host.size());
    each([&](int64_t offset, size_t) { own[offset] = true; });
    for (size_t i = 0; i < own.size(); ++i) {
      uint16_t bits;
      std::memcpy(&bits, &buffer.host[i], sizeof(bits));
      if (!own[i] && bits != 0xffff) {
        return false;
      }
    }
    return true;
  }

  const TensorView& view() const { return view_; }

 private:
  static TensorView strides(const Case& test, int seqlen, int heads) {
    const int64_t pad = test.layout == Layout::kPacked ? 0 : 1;
    const int64_t rows = seqlen + 3 * pad;
    const int64_t cols = test.head_dim + 8 * pad;
    if (test.layout == Layout::kHeadsFirst) {
      return {nullptr, heads * rows * cols, cols, rows * cols};
    }
    return {nullptr, rows * heads * cols, heads * cols, cols};
  }

  template <typename Visit>
  void each(Visit&& visit) const {
    size_t i = 0;
    for (int b = 0; b < batch_; ++b) {
      for (int row = 0; row < seqlen_; ++row) {
        for (int head = 0; head < heads_; ++head) {
          for (int col = 0; col < head_dim_; ++col) {
            visit(view_.offset(b, row, head) + col, i++);
          }
        }
      }
    }
  }

  int batch_, seqlen_, heads_, head_dim_;
  TensorView view_;

 public:
  DeviceBuffer<Element> buffer;
};

struct Reference {
  std::vector<double> out, lse, dq, dk, dv;
};

// All in (batch, seqlen, heads, head_dim) order; lse (batch, heads, seqlen_q).
Reference reference_of(const Case& t, const WindowMask& window, const std::vector<double>& q,
                       const std::vector<double>& k, const std::vector<double>& v,
                       const std::vector<double>& dout, const std::vector<double>& dlse) {
  Reference r{std::vector<double>(q.size()), std::vector<double>(dlse.size()),
              std::vector<double>(q.size()), std::vector<double>(k.size()),
              std::vector<double>(v.size())};
  const int d = t.head_dim;
  std::vector<double> p(t.seqlen_k);
  for (int b = 0; b < t.batch; ++b) {
    for (int h = 0; h < t.heads; ++h) {
      const int kv = h / (t.heads / t.heads_kv);
      const auto key_at = [&](int j) {
        return ((static_cast<size_t>(b) * t.seqlen_k + j) * t.heads_kv + kv) * d;
      };
      for (int i = 0; i < t.seqlen_q; ++i) {
        const size_t query = ((static_cast<size_t>(b) * t.seqlen_q + i) * t.heads + h) * d;
        const size_t row = (static_cast<size_t>(b) * t.heads + h) * t.seqlen_q + i;
        double largest = -INFINITY;
        for (int j = 0; j < t.seqlen_k; ++j) {
          p[j] = -INFINITY;
          if (window.allows(i, j)) {
            double score = 0;
            for (int c = 0; c < d; ++c) {
              score += q[query + c] * k[key_at(j) + c];
            }
            p[j] = t.softmax_scale() * score;
          }
          largest = std::max(largest, p[j]);
        }
        if (largest == -INFINITY) {
          r.lse[row] = -INFINITY;
          continue;
        }
        double sum = 0;
        for (double& x : p) {
          sum += x = std::exp(x - largest);
        }
        r.lse[row] = largest + std::log(sum);
        double delta = -dlse[row];
        for (int c = 0; c < d; ++c) {
          double out = 0;
          for (int j = 0; j < t.seqlen_k; ++j) {
            out += p[j] / sum * v[key_at(j) + c];
          }
          r.out[query + c] = out;
          delta += out * dout[query + c];
        }
        for (int j = 0; j < t.seqlen_k; ++j) {
          const double pj = p[j] / sum;
          double dp = 0;
          for (int c = 0; c < d; ++c) {
            dp += dout[query + c] * v[key_at(j) + c];
          }
          const double ds = pj * (dp - delta) * t.softmax_scale();
          for (int c = 0; c < d; ++c) {
            r.dv[key_at(j) + c] += pj * dout[query + c];
            r.dq[query + c] += ds * k[key_at(j) + c];
            r.dk[key_at(j) + c] += ds * q[query + c];
          }
        }
      }
    }
  }
  return r;
}

// The relative Frobenius error, or NaN if an element is not finite. Where the reference nearly
// vanishes the error is relative to a hundredth of unit elements.
double error_of(const std::vector<double>& actual, const std::vector<double>& expected) {
  double difference = 0;
  double norm = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    difference += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return actual.empty()
             ? 0.0
             : std::sqrt(difference) / (std::sqrt(norm) + 0.01 * std::sqrt(actual.size()));
}

template <typename Element>
void compare(const KernelConfig& config, const Case& test, const char* name,
             const Tensor<Element>& actual, const std::vector<double>& expected, double bound) {
  ++g_checks;
  const double error = error_of(actual.values(), expected);
  if (!(error < bound)) {
    fail(config, test, std::string(name) + " has relative error " + std::to_string(error));
  }
  if (!actual.surroundings_untouched()) {
    fail(config, test, std::string(name) + ": wrote outside");
  }
}

bool same_bits(const void* a, const void* b, size_t bytes) {
  return bytes == 0 || std::memcmp(a, b, bytes) == 0;
}

template <typename Element>
void run_case(const KernelConfig& fwd, const RegisteredKernel& forward, const KernelConfig& bwd,
              const RegisteredKernel& backward, const Case& t) {
  std::mt19937 generator(1234);
  Tensor<Element> q(t, t.seqlen_q, t.heads);
  Tensor<Element> k(t, t.seqlen_k, t.heads_kv);
  Tensor<Element> v(t, t.seqlen_k, t.heads_kv);
  Tensor<Element> dout(t, t.seqlen_q, t.heads);
  Tensor<Element> out(t, t.seqlen_q, t.heads);
  q.randomize(generator, t.magnitude);
  k.randomize(generator, 1.0f);
  v.randomize(generator, 1.0f);
  dout.randomize(generator, 1.0f);
  out.buffer.upload();

  const size_t rows = static_cast<size_t>(t.batch) * t.heads * t.seqlen_q;
  const size_t guard = 64;
  DeviceBuffer<float> lse(rows + guard);
  DeviceBuffer<float> delta(rows + guard);
  DeviceBuffer<float> dlse(rows);
  std::normal_distribution<float> normal;
  std::vector<double> dlse_values(rows);
  for (size_t i = 0; t.dlse && i < rows; ++i) {
    dlse_values[i] = dlse.host[i] = normal(generator);
  }
  lse.upload();
  delta.upload();
  dlse.upload();

  const Shape shape = {t.batch, t.heads, t.heads_kv, t.seqlen_q, t.seqlen_k, t.head_dim};
  const WindowMask window(t.seqlen_q, t.seqlen_k, t.left, t.right);
  const FwdParams fwd_params = {shape,    window,   t.softmax_scale(), q.view(),
                                k.view(), v.view(), out.view(),        lse.data};
  forward.forward(fwd_params, {});
  check_cuda(cudaDeviceSynchronize(), "run ", fwd.name(), " on case ", t.name);
  out.buffer.download();
  lse.download();

  const Reference expected =
      reference_of(t, window, q.values(), k.values(), v.values(), dout.values(), dlse_values);
  const double bound = fwd.dtype == Dtype::kBFloat16 ? 1e-2 : 2e-3;
  compare(fwd, t, "out", out, expected.out, bound);
  ++g_checks;
  for (size_t i = 0; i < lse.host.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &lse.host[i], sizeof(bits));
    const double e = i < rows ? expected.lse[i] : 0.0;
    const bool right =
        i >= rows ? bits == 0xffffffff
                  : lse.host[i] == e || std::abs(lse.host[i] - e) <= 1e-4 + 1e-5 * std::abs(e);
    if (!right) {
      fail(fwd, t,
           "lse[" + std::to_string(i) + "] is " + std::to_string(lse.host[i]) + ", expected " +
               std::to_string(e));
      break;
    }
  }

  // Softmax near one-hot makes gradients small differences of large numbers.
  const double gradient_bound = t.magnitude > 1.0f ? 10 * bound : bound;
  std::vector<Element> first_run;
  for (int run = 0; run < 2; ++run) {
    Tensor<Element> dq(t, t.seqlen_q, t.heads);
    Tensor<Element> dk(t, t.seqlen_k, t.heads_kv);
    Tensor<Element> dv(t, t.seqlen_k, t.heads_kv);
    dq.buffer.upload();
    dk.buffer.upload();
    dv.buffer.upload();
    const BwdParams bwd_params = {
        shape,      window,     t.softmax_scale(), q.view(), k.view(),
        v.view(),   out.view(), dout.view(),       lse.data, t.dlse ? dlse.data : nullptr,
        delta.data, dq.view(),  dk.view(),         dv.view()};
    backward.backward(bwd_params, {});
    check_cuda(cudaDeviceSynchronize(), "run ", bwd.name(), " on case ", t.name);
    std::vector<Element> all;
    for (Tensor<Element>* gradient : {&dq, &dk, &dv}) {
      gradient->buffer.download();
      all.insert(all.end(), gradient->buffer.host.begin(), gradient->buffer.host.end());
    }
    if (run == 0) {
      compare(bwd, t, "dq", dq, expected.dq, gradient_bound);
      compare(bwd, t, "dk", dk, expected.dk, gradient_bound);
      compare(bwd, t, "dv", dv, expected.dv, gradient_bound);
      first_run = all;
    } else if (!same_bits(all.data(), first_run.data(), all.size() * sizeof(Element))) {
      fail(bwd, t, "two runs differ");
    }
  }
  delta.download();
  for (size_t i = rows; i < delta.host.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &delta.host[i], sizeof(bits));
    if (bits != 0xffffffff) {
      fail(bwd, t, "delta: wrote outside");
      break;
    }
  }
}

void run_rows(int fwd_row, int bwd_row, bool many) {
  const KernelConfig& fwd = table::kRows[fwd_row];
  const KernelConfig& bwd = table::kRows[bwd_row];
  const RegisteredKernel& forward = registry().kernels[fwd_row];
  const RegisteredKernel& backward = registry().kernels[bwd_row];
  for (const auto* pair : {&fwd, &bwd}) {
    const KernelResources r = registry().kernels[pair == &fwd ? fwd_row : bwd_row].resources();
    std::printf("%s: %d registers, %lld local, %lld static and %lld dynamic shared memory\n",
                pair->name().c_str(), r.registers, static_cast<long long>(r.local_bytes),
                static_cast<long long>(r.static_smem_bytes),
                static_cast<long long>(r.dynamic_smem_bytes));
  }
  const auto run = [&](const Case& test) {
    const bool fits =
        test.head_dim <= fwd.head_dim && (fwd.mask == MaskMode::kWindow || test.full());
    if (fits && fwd.dtype == Dtype::kBFloat16) {
      run_case<__nv_bfloat16>(fwd, forward, bwd, backward, test);
    } else if (fits) {
      run_case<__half>(fwd, forward, bwd, backward, test);
    }
  };
  for (const Case& test : kCases) {
    run(test);
  }
  if (many && fwd.head_dim == 64) {
    run(kManyWorkItems);
  }
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no GPU\n");
    return 77;
  }
  const bool many = argc > 1 && std::string(argv[1]) == "many";
  try {
    const CudaDevice device = registry().query_cuda_device(0);
    std::printf("compute capability %d, %lld bytes of shared memory, CUDA %d\n",
                device.compute_capability, static_cast<long long>(device.smem_opt_in),
                registry().cuda_version);
    for (int f = 0; f < kNumRows; ++f) {
      const KernelConfig& fwd = table::kRows[f];
      for (int b = 0; b < kNumRows; ++b) {
        const KernelConfig& bwd = table::kRows[b];
        if (fwd.family == Family::kSm80 && bwd.family == fwd.family && fwd.pass == Pass::kForward &&
            bwd.pass == Pass::kBackward && fwd.dtype == bwd.dtype && fwd.head_dim == bwd.head_dim &&
            fwd.mask == bwd.mask) {
          run_rows(f, b, many);
        }
      }
    }
  } catch (const Error& error) {
    std::printf("FAILED %s\n", error.what());
    return 1;
  }
  std::printf("%d comparisons, %d failures\n", g_checks, g_failures);
  return g_failures == 0 ? 0 : 1;
}
