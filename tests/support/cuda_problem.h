// SPDX-License-Identifier: BSD-3-Clause
// An attention problem in device memory. All memory around and between the rows that count is NaN,
// in inputs so that it matters to read it, in outputs so that it shows where it was written.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "support/cuda_check.h"
#include "tests/support/cuda_reference.h"

namespace fa::test {

inline constexpr int kPoison = 0xff;  // every type reads NaN where all bytes are this
inline constexpr int kGuard = 64;     // poisoned elements before and after an array

template <typename T>
bool is_poison(const T& value) {
  unsigned char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  return std::all_of(bytes, bytes + sizeof(T), [](int byte) { return byte == kPoison; });
}

// `count` elements of poison between guards.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count) : count_(count) {
    check_cuda(cudaMalloc(&memory_, bytes()), "allocate");
    poison();
  }
  ~DeviceArray() { cudaFree(memory_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return memory_ + kGuard; }
  void poison() { check_cuda(cudaMemset(memory_, kPoison, bytes()), "fill"); }
  void upload(const std::vector<T>& values) {
    check_cuda(cudaMemcpy(data(), values.data(), values.size() * sizeof(T), cudaMemcpyDefault),
               "copy to the device");
  }
  std::vector<T> download() const {
    std::vector<T> values(count_);
    check_cuda(cudaMemcpy(values.data(), data(), count_ * sizeof(T), cudaMemcpyDefault),
               "copy to the host");
    return values;
  }
  bool guards_hold() const {
    T guards[2 * kGuard];
    const size_t size = kGuard * sizeof(T);
    check_cuda(cudaMemcpy(guards, memory_, size, cudaMemcpyDefault), "copy to the host");
    check_cuda(cudaMemcpy(guards + kGuard, data() + count_, size, cudaMemcpyDefault),
               "copy to the host");
    return std::all_of(guards, guards + 2 * kGuard, is_poison<T>);
  }

 private:
  size_t bytes() const { return (count_ + 2 * kGuard) * sizeof(T); }

  int64_t count_;
  T* memory_ = nullptr;
};

// The rows of queries or of keys: how the tensors that hold them are made, and which of them count.
class Rows {
 public:
  Rows(int batch, int seqlen, const std::vector<int>& packed, const std::vector<int>& used)
      : entries_(batch), per_entry_(seqlen), cu_seqlens_(packed.size() + 1), seqused_(used.size()) {
    std::vector<int32_t> cu_seqlens = {0};
    for (int b = 0; b < batch; ++b) {
      cu_seqlens.push_back(cu_seqlens.back() + (packed.empty() ? seqlen : packed[b]));
      begins_.push_back(packed.empty() ? 0 : cu_seqlens[b]);
      lengths_.push_back(used.empty() ? cu_seqlens[b + 1] - cu_seqlens[b] : used[b]);
    }
    if (!packed.empty()) {
      constexpr int kBeyond = 5;  // rows that belong to no sequence
      entries_ = 1;
      per_entry_ = cu_seqlens.back() + kBeyond;
      cu_seqlens_.upload(cu_seqlens);
      device_.cu_seqlens = cu_seqlens_.data();
      device_.packed_rows = per_entry_;
    }
    if (!used.empty()) {
      seqused_.upload({used.begin(), used.end()});
      device_.seqused = seqused_.data();
    }
  }

  bool packed() const { return device_.cu_seqlens != nullptr; }
  int entries() const { return entries_; }
  int per_entry() const { return per_entry_; }
  int batch() const { return static_cast<int>(lengths_.size()); }
  int begin(int b) const { return begins_[b]; }
  const std::vector<int>& lengths() const { return lengths_; }
  const Sequences& on_device() const { return device_; }

  int64_t tiles(int seqlen, int tile_rows) const {
    // count_tiles reads no element of cu_seqlens, which the host could not.
    return device_.count_tiles(batch(), per_entry_, seqlen, tile_rows);
  }

 private:
  int entries_;    // of the batch dimension of a tensor
  int per_entry_;  // rows of each
  std::vector<int> begins_;
  std::vector<int> lengths_;
  DeviceArray<int32_t> cu_seqlens_;
  DeviceArray<int32_t> seqused_;
  Sequences device_;
};

// Where the elements of a tensor lie.
struct Placement {
  TensorView view;                // without data
  int64_t count;                  // of all elements, those of gaps included
  std::vector<int64_t> elements;  // in the order (sequence, row, head, column)
  std::vector<bool> is_gap;
};

inline Placement place(const Rows& rows, const TensorView& strides, int64_t entry_stride, int heads,
                       int head_dim) {
  Placement placement = {strides, entry_stride * rows.entries(), {}, {}};
  placement.is_gap.resize(placement.count, true);
  for (int b = 0; b < rows.batch(); ++b) {
    for (int row = 0; row < rows.lengths()[b]; ++row) {
      for (int head = 0; head < heads; ++head) {
        const int64_t first = strides.offset(b, rows.begin(b) + row, head);
        for (int col = 0; col < head_dim; ++col) {
          placement.elements.push_back(first + col);
          placement.is_gap[first + col] = false;
        }
      }
    }
  }
  return placement;
}

inline Placement place_tensor(const Rows& rows, Layout layout, int heads, int head_dim) {
  const int gap = layout == Layout::kContiguous ? 0 : 1;
  const int64_t seqlen = rows.per_entry() + 3 * gap;
  const int64_t cols = head_dim + 8 * gap;
  const int64_t entry = seqlen * heads * cols;
  const int64_t batch_stride = rows.packed() ? 0 : entry;
  const TensorView strides = layout == Layout::kHeadsFirst
                                 ? TensorView{nullptr, batch_stride, cols, seqlen * cols}
                                 : TensorView{nullptr, batch_stride, heads * cols, cols};
  return place(rows, strides, entry, heads, head_dim);
}

// Of one value for each row of each head, contiguous along the rows.
inline Placement place_statistics(const Rows& rows, int heads) {
  const int64_t entry = int64_t{heads} * rows.per_entry();
  return place(rows, {nullptr, rows.packed() ? 0 : entry, 1, rows.per_entry()}, entry, heads, 1);
}

template <typename T>
class DeviceTensor {
 public:
  explicit DeviceTensor(const Placement& placement)
      : placement_(placement), array_(placement.count) {}

  DeviceTensor(const Placement& placement, const std::vector<double>& values)
      : DeviceTensor(placement) {
    std::vector<T> all = array_.download();
    for (size_t i = 0; i < values.size(); ++i) {
      all[placement.elements[i]] = static_cast<T>(static_cast<float>(values[i]));
    }
    array_.upload(all);
  }

  TensorView view() const {
    TensorView view = placement_.view;
    view.data = array_.data();
    return view;
  }
  RowStatistics statistics() const {
    return {array_.data(), placement_.view.batch_stride, placement_.view.head_stride};
  }
  const Placement& placement() const { return placement_; }
  void poison() { array_.poison(); }
  std::vector<T> download() const { return array_.download(); }

  // False if anything but the tensor's elements was written.
  bool gaps_hold(const std::vector<T>& downloaded) const {
    for (size_t i = 0; i < downloaded.size(); ++i) {
      if (placement_.is_gap[i] && !is_poison(downloaded[i])) {
        return false;
      }
    }
    return array_.guards_hold();
  }

 private:
  const Placement& placement_;
  DeviceArray<T> array_;
};

template <typename Element>
std::vector<double> random_elements(std::mt19937& generator, size_t count, float magnitude) {
  std::normal_distribution<float> normal;
  std::vector<double> values(count);
  for (double& value : values) {
    value = static_cast<float>(static_cast<Element>(magnitude * normal(generator)));
  }
  return values;
}

// A case with its inputs on the device and what is to come of them. The inputs of the backward pass
// are those that a perfect forward pass gives.
template <typename Element>
class Problem {
 public:
  explicit Problem(const Case& test)
      : test(test),
        queries(test.shape.batch, test.shape.seqlen_q, test.lengths_q, test.used_q),
        keys(test.shape.batch, test.shape.seqlen_k, test.lengths_k, test.used_k),
        of_queries(place_tensor(queries, test.layout, test.shape.num_heads, test.shape.head_dim)),
        of_keys(place_tensor(keys, test.layout, test.shape.num_heads_kv, test.shape.head_dim)),
        of_statistics(place_statistics(queries, test.shape.num_heads)),
        inputs_(random_inputs()),
        expected(NaiveAttention(test, queries.lengths(), keys.lengths()).run(inputs_)),
        q_(of_queries, inputs_.q),
        k_(of_keys, inputs_.k),
        v_(of_keys, inputs_.v),
        dout_(of_queries, inputs_.dout),
        dlse_(of_statistics, inputs_.dlse),
        out_(of_queries, expected.out),
        lse_(of_statistics, expected.lse) {}

  FwdParams forward(const DeviceTensor<Element>& out, const DeviceTensor<float>& lse) const {
    return {.shape = test.shape,
            .window = window(),
            .softmax_scale = test.softmax_scale(),
            .q = q_.view(),
            .k = k_.view(),
            .v = v_.view(),
            .out = out.view(),
            .softmax_lse = lse.statistics(),
            .queries = queries.on_device(),
            .keys = keys.on_device()};
  }

  BwdParams backward(const DeviceTensor<Element>& dq, const DeviceTensor<Element>& dk,
                     const DeviceTensor<Element>& dv, const BwdWorkspace& workspace) const {
    return {.shape = test.shape,
            .window = window(),
            .softmax_scale = test.softmax_scale(),
            .q = q_.view(),
            .k = k_.view(),
            .v = v_.view(),
            .out = out_.view(),
            .dout = dout_.view(),
            .dq = dq.view(),
            .dk = dk.view(),
            .dv = dv.view(),
            .softmax_lse = lse_.statistics(),
            .dlse = test.dlse ? dlse_.statistics() : RowStatistics{},
            .delta = {},
            .workspace = workspace,
            .queries = queries.on_device(),
            .keys = keys.on_device()};
  }

  const Case test;
  const Rows queries;
  const Rows keys;
  const Placement of_queries;
  const Placement of_keys;
  const Placement of_statistics;

 private:
  WindowMask window() const {
    return {test.shape.seqlen_q, test.shape.seqlen_k, test.left, test.right};
  }

  Inputs random_inputs() const {
    std::mt19937 generator(1234);
    const auto random = [&](const Placement& placement, float magnitude) {
      return random_elements<Element>(generator, placement.elements.size(), magnitude);
    };
    Inputs inputs{random(of_queries, test.magnitude), random(of_keys, 1.0f), random(of_keys, 1.0f),
                  random(of_queries, 1.0f), random(of_statistics, test.dlse ? 1.0f : 0.0f)};
    return inputs;
  }

  Inputs inputs_;

 public:
  const Reference expected;

 private:
  DeviceTensor<Element> q_, k_, v_, dout_;
  DeviceTensor<float> dlse_;
  DeviceTensor<Element> out_;
  DeviceTensor<float> lse_;
};

}  // namespace fa::test
