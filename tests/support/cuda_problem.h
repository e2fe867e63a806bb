// SPDX-License-Identifier: BSD-3-Clause
// An attention problem in device memory. All memory around and between the rows that count is NaN,
// in inputs so that it matters to read it, in outputs so that it shows where it was written.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
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

// Rules on the device. Memory of a bias that no seen pair has is poison.
class DeviceRules {
 public:
  DeviceRules(const HostRules& rules, const std::vector<bool>& bias_seen)
      : rules_(rules),
        bias_(rules.bias_entries().count * bytes_of_bias()),
        ids_(static_cast<int64_t>(rules.ids().size())),
        prefix_lens_(static_cast<int64_t>(rules.spec().prefix_lens.size())),
        slopes_(static_cast<int64_t>(rules.slopes().size())),
        sinks_(static_cast<int64_t>(rules.sinks().size())),
        rng_state_(static_cast<int64_t>(rules.rng_state().size())) {
    if (rules.spec().bias) {
      bias_.upload(bytes_of(rules.bias(), bias_seen));
    }
    for (const HostRules::Mask& mask : rules.masks()) {
      masks_.push_back(std::make_unique<DeviceArray<uint8_t>>(mask.entries.count));
      masks_.back()->upload(mask.bytes);
    }
    ids_.upload(rules.ids());
    prefix_lens_.upload({rules.spec().prefix_lens.begin(), rules.spec().prefix_lens.end()});
    slopes_.upload(rules.slopes());
    sinks_.upload(rules.sinks());
    rng_state_.upload(rules.rng_state());
  }

  ScoreRules view() const {
    ScoreRules view;
    if (rules_.spec().bias) {
      view.bias = tensor(rules_.bias_entries(), bias_.data());
      view.bias_dtype = rules_.spec().bias->dtype;
    }
    for (size_t i = 0; i < masks_.size(); ++i) {
      const HostRules::Mask& mask = rules_.masks()[i];
      view.masks[i] = {tensor(mask.entries, masks_[i]->data()), mask.block_log2};
    }
    if (!rules_.ids().empty()) {
      view.document_ids = ids_.data();
      view.document_stride = rules_.seqlen();
    }
    if (!rules_.spec().prefix_lens.empty()) {
      view.prefix_lens = prefix_lens_.data();
    }
    const TermSpec& terms = rules_.spec().terms;
    view.terms.softcap = terms.softcap;
    if (!rules_.slopes().empty()) {
      view.terms.alibi = with_data(rules_.slope_strides(), slopes_.data());
    }
    if (!rules_.sinks().empty()) {
      view.terms.sinks = {sinks_.data(), 0, 1};
    }
    if (terms.dropout_p > 0) {
      view.terms.dropout = Dropout::of(terms.dropout_p, rng_state_.data());
    }
    return view;
  }

  static HeadValues with_data(HeadValues values, void* data) {
    values.data = data;
    return values;
  }

  static ScoreTensor tensor(const Entries& entries, void* data) {
    ScoreTensor tensor = entries.strides;
    tensor.data = data;
    return tensor;
  }

  // Between numbers and the bytes of the bias's dtype; poison where `is_entry` does not hold.
  std::vector<uint8_t> bytes_of(const std::vector<double>& values,
                                const std::vector<bool>& is_entry) const {
    const size_t size = bytes_of_bias();
    std::vector<uint8_t> bytes(values.size() * size, kPoison);
    for (size_t i = 0; i < values.size(); ++i) {
      const auto value = static_cast<float>(values[i]);
      const __half half = __float2half(value);
      const __nv_bfloat16 bfloat16 = __float2bfloat16(value);
      const void* source = size == sizeof(float)                ? static_cast<const void*>(&value)
                           : dtype_of_bias() == Dtype::kFloat16 ? static_cast<const void*>(&half)
                                                                : &bfloat16;
      if (is_entry[i]) {
        std::memcpy(&bytes[i * size], source, size);
      }
    }
    return bytes;
  }
  double number_of(const uint8_t* bytes) const {
    const auto read = [&](auto value) {
      std::memcpy(&value, bytes, sizeof(value));
      return static_cast<double>(static_cast<float>(value));
    };
    return dtype_of_bias() == Dtype::kFloat32   ? read(float{})
           : dtype_of_bias() == Dtype::kFloat16 ? read(__half{})
                                                : read(__nv_bfloat16{});
  }

  Dtype dtype_of_bias() const {
    return rules_.spec().bias ? rules_.spec().bias->dtype : Dtype::kFloat32;
  }
  size_t bytes_of_bias() const { return dtype_of_bias() == Dtype::kFloat32 ? 4 : 2; }

 private:
  const HostRules& rules_;
  DeviceArray<uint8_t> bias_;
  std::vector<std::unique_ptr<DeviceArray<uint8_t>>> masks_;
  DeviceArray<int32_t> ids_;
  DeviceArray<int32_t> prefix_lens_;
  DeviceArray<float> slopes_;
  DeviceArray<float> sinks_;
  DeviceArray<int64_t> rng_state_;
};

// The memory of a gradient of slopes or sinks, as the API allocates it; poison where results go.
class DeviceHeadGradient {
 public:
  // count: of its sums, 0 where nobody asks for it. tiles: of a head.
  DeviceHeadGradient(size_t count, const HeadValues& strides, int heads, int64_t tiles)
      : sums_(static_cast<int64_t>(count)), partial_(heads * tiles), tiles_(tiles) {
    strides_ = strides;
    strides_.data = count > 0 ? sums_.data() : nullptr;
  }

  HeadGradient view() const { return {strides_, partial_.data(), tiles_}; }
  std::vector<float> download() const { return sums_.download(); }
  bool guards_hold() const { return sums_.guards_hold() && partial_.guards_hold(); }

 private:
  DeviceArray<float> sums_;
  DeviceArray<float> partial_;
  int64_t tiles_;
  HeadValues strides_;
};

// The tile map of a problem for a row's tiles, as the API allocates it.
class DeviceTileMap {
 public:
  DeviceTileMap(const Shape& shape, const Rows& queries, const ScoreRules& rules, int tile_m,
                int tile_n)
      : key_tiles_(ceil_div(shape.seqlen_k, tile_n)),
        of_head_(queries.tiles(shape.seqlen_q, tile_m) * key_tiles_),
        by_head_(std::any_of(std::begin(rules.masks), std::end(rules.masks),
                             [](const KeepMask& mask) { return mask.head_stride != 0; })),
        classes_(rules.has_data_masks() ? of_head_ * (by_head_ ? shape.num_heads : 1) : 0),
        is_used_(rules.has_data_masks()) {}

  TileMap view() const {
    return is_used_ ? TileMap{classes_.data(), by_head_ ? of_head_ : 0, key_tiles_} : TileMap{};
  }
  bool guards_hold() const { return classes_.guards_hold(); }

 private:
  int key_tiles_;
  int64_t of_head_;
  bool by_head_;
  DeviceArray<TileClass> classes_;
  bool is_used_;
};

// The bits of a mask for a row's kernel, as the API allocates them.
class DevicePairBits {
 public:
  template <typename Params>
  DevicePairBits(const Params& params, const KernelConfig& config)
      : bits_(config.reads_pair_bits() ? pair_bits_of(params, config.tile_m, config.tile_n)
                                       : PairBits{}),
        words_(bits_.count) {}

  PairBits view() const {
    PairBits view = bits_;
    view.words = bits_.count > 0 ? words_.data() : nullptr;
    return view;
  }
  bool guards_hold() const { return words_.guards_hold(); }

 private:
  PairBits bits_;
  DeviceArray<uint32_t> words_;
};

// A case with its inputs on the device and what is to come of them. The inputs of the backward pass
// are those that a perfect forward pass gives.
template <typename Element>
class Problem {
 public:
  explicit Problem(const Case& test)
      : test(test),
        queries(test.shape.batch, test.shape.seqlen_q, test.lengths_q, test.used_q),
        keys(test.shape.batch, test.shape.seqlen_k, test.lengths_k, test.used_k),
        shape(shape_of(test, queries, keys)),
        of_q(place_tensor(queries, test.layout, test.shape.num_heads, test.shape.head_dim)),
        of_k(place_tensor(keys, test.layout, test.shape.num_heads_kv, test.shape.head_dim)),
        of_v(place_tensor(keys, test.layout, test.shape.num_heads_kv, test.shape.head_dim_v)),
        of_out(place_tensor(queries, test.layout, test.shape.num_heads, test.shape.head_dim_v)),
        of_statistics(place_statistics(queries, test.shape.num_heads)),
        generator_(1234),
        inputs_(random_inputs()),
        host_rules(test.rules, test.shape, generator_),
        naive_(test, host_rules, queries.lengths(), keys.lengths()),
        expected(naive_.run(inputs_)),
        rules(host_rules, naive_.bias_seen()),
        bias_entries(host_rules.is_entry_of_bias(test.shape)),
        q_(of_q, inputs_.q),
        k_(of_k, inputs_.k),
        v_(of_v, inputs_.v),
        dout_(of_out, inputs_.dout),
        dlse_(of_statistics, inputs_.dlse),
        out_(of_out, expected.out),
        lse_(of_statistics, expected.lse) {}

  FwdParams forward(const DeviceTensor<Element>& out, const DeviceTensor<float>& lse,
                    const TileMap& tile_map) const {
    return {.shape = shape,
            .window = window(),
            .softmax_scale = test.softmax_scale(),
            .q = q_.view(),
            .k = k_.view(),
            .v = v_.view(),
            .out = out.view(),
            .softmax_lse = lse.statistics(),
            .queries = queries.on_device(),
            .keys = keys.on_device(),
            .rules = rules.view(),
            .tile_map = tile_map};
  }

  BwdParams backward(const DeviceTensor<Element>& dq, const DeviceTensor<Element>& dk,
                     const DeviceTensor<Element>& dv, const BwdWorkspace& workspace,
                     const TileMap& tile_map, const ScoreTensor& dbias, const HeadGradient& dslopes,
                     const HeadGradient& dsinks) const {
    return {.shape = shape,
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
            .keys = keys.on_device(),
            .rules = rules.view(),
            .tile_map = tile_map,
            .dbias = dbias,
            .dslopes = dslopes,
            .dsinks = dsinks};
  }

  const Case test;
  const Rows queries;
  const Rows keys;
  const Shape shape;  // as kernels are told
  const Placement of_q;
  const Placement of_k;
  const Placement of_v;
  const Placement of_out;
  const Placement of_statistics;

 private:
  static Shape shape_of(const Case& test, const Rows& queries, const Rows& keys) {
    Shape shape = test.shape;
    if (test.total_lengths) {
      shape.seqlen_q = queries.packed() ? queries.per_entry() : shape.seqlen_q;
      shape.seqlen_k = keys.packed() ? keys.per_entry() : shape.seqlen_k;
    }
    return shape;
  }

  WindowMask window() const { return {shape.seqlen_q, shape.seqlen_k, test.left, test.right}; }

  Inputs random_inputs() {
    const auto random = [&](const Placement& placement, float magnitude) {
      return random_elements<Element>(generator_, placement.elements.size(), magnitude);
    };
    Inputs inputs{random(of_q, test.magnitude), random(of_k, 1.0f), random(of_v, 1.0f),
                  random(of_out, 1.0f), random(of_statistics, test.dlse ? 1.0f : 0.0f)};
    return inputs;
  }

  std::mt19937 generator_;
  Inputs inputs_;

 public:
  const HostRules host_rules;

 private:
  NaiveAttention naive_;

 public:
  const Reference expected;
  const DeviceRules rules;
  const std::vector<bool> bias_entries;  // which elements of its memory are entries

 private:
  DeviceTensor<Element> q_, k_, v_, dout_;
  DeviceTensor<float> dlse_;
  DeviceTensor<Element> out_;
  DeviceTensor<float> lse_;
};

}  // namespace fa::test
