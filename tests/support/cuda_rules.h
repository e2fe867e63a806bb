// SPDX-License-Identifier: BSD-3-Clause
// Rules for scores (common/score_rules.h) on the host and on the device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <random>
#include <vector>

#include "common/params.h"

namespace fa::test {

// Of which dimensions one entry stands for all.
struct Broadcast {
  bool batch = false;
  bool head = false;
  bool query = false;
  bool key = false;
};

struct BiasSpec {
  Broadcast over;
  Dtype dtype = Dtype::kFloat32;
  bool queries_last = false;    // in memory
  double minus_infinity = 0.0;  // how many of its entries
  int step = 0;                 // from row to row, which then overlap; no gradient is asked for
};

struct MaskSpec {
  Broadcast over;
  int block_log2 = 0;
  bool queries_last = false;
  int grain = 1;      // squares of so many entries say the same,
  double keep = 0.7;  // and so many of them keep
  int step = 0;       // from row to row, which then overlap
};

// Terms of common/score_terms.h.
enum class Slopes { kNone, kOfHeads, kOfAll };  // of all: of each head of each batch entry
struct TermSpec {
  double softcap = 0;
  Slopes alibi = Slopes::kNone;
  bool sinks = false;
  double dropout_p = 0;
  bool max_logit = false;

  bool any() const {
    return softcap != 0 || alibi != Slopes::kNone || sinks || dropout_p > 0 || max_logit;
  }
};

struct RuleSpec {
  std::optional<BiasSpec> bias;
  std::vector<MaskSpec> masks;
  int documents = 0;  // of about the same length
  std::vector<int> prefix_lens;
  TermSpec terms;

  // An entry of the gradient has a place of its own.
  bool has_dbias() const { return bias.has_value() && bias->step == 0; }
  bool any() const {
    return bias.has_value() || !masks.empty() || documents > 0 || !prefix_lens.empty() ||
           terms.any();
  }
};

// Where the entries of a ScoreTensor lie; rows have a gap behind them, or overlap.
struct Entries {
  ScoreTensor strides;  // without data
  int64_t count = 0;

  int64_t at(int64_t batch, int64_t head, int64_t query, int64_t key) const {
    return batch * strides.batch_stride + head * strides.head_stride + strides.offset(query, key);
  }
};

template <typename Spec>
Entries place_entries(const Spec& spec, int batch, int heads, int queries, int keys) {
  constexpr int kGap = 16;
  const Broadcast& over = spec.over;
  const bool queries_last = spec.queries_last;
  const int64_t rows = over.query ? 1 : queries;
  const int64_t cols = over.key ? 1 : keys;
  const int64_t length = (queries_last ? rows : cols) + kGap;
  const int64_t line = spec.step == 0 ? length : spec.step;
  const int64_t end = (queries_last ? cols : rows) * line;
  const int64_t matrix = spec.step == 0 ? end : (end + length) / kGap * kGap;
  const int64_t entry = (over.head ? 1 : heads) * matrix;
  Entries entries;
  entries.strides.batch_stride = over.batch ? 0 : entry;
  entries.strides.head_stride = over.head ? 0 : matrix;
  entries.strides.query_stride = over.query ? 0 : queries_last ? 1 : line;
  entries.strides.key_stride = over.key ? 0 : queries_last ? line : 1;
  entries.count = (over.batch ? 1 : batch) * entry;
  return entries;
}

// Random rules of a spec. Shape: of the longest sequences.
class HostRules {
 public:
  struct Mask {
    Entries entries;
    int block_log2;
    std::vector<uint8_t> bytes;
  };

  HostRules(const RuleSpec& spec, const Shape& shape, std::mt19937& generator)
      : spec_(spec), seqlen_(std::max(shape.seqlen_q, shape.seqlen_k)) {
    std::uniform_real_distribution<double> uniform;
    if (spec.bias) {
      bias_entries_ =
          place_entries(*spec.bias, shape.batch, shape.num_heads, shape.seqlen_q, shape.seqlen_k);
      std::normal_distribution<float> normal;
      for (int64_t i = 0; i < bias_entries_.count; ++i) {
        constexpr float kUnit = 1.0f / 64;  // so that every dtype has the value
        const float value = std::round(std::clamp(normal(generator), -3.0f, 3.0f) / kUnit) * kUnit;
        bias_.push_back(uniform(generator) < spec.bias->minus_infinity
                            ? -std::numeric_limits<double>::infinity()
                            : value);
      }
    }
    for (const MaskSpec& mask : spec.masks) {
      masks_.push_back(random_mask(mask, shape, generator));
    }
    if (spec.documents > 0) {
      for (int i = 0; i < shape.batch * seqlen_; ++i) {
        const int length = (seqlen_ + spec.documents - 1) / spec.documents;
        ids_.push_back((i % seqlen_ + i / seqlen_ * 5) / length - 1);
      }
    }
    draw_terms(shape, generator);
  }

  const RuleSpec& spec() const { return spec_; }
  const Entries& bias_entries() const { return bias_entries_; }
  const std::vector<double>& bias() const { return bias_; }
  const std::vector<Mask>& masks() const { return masks_; }
  const std::vector<int32_t>& ids() const { return ids_; }
  int seqlen() const { return seqlen_; }  // of ids

  int prefix(int batch) const { return spec_.prefix_lens.empty() ? 0 : spec_.prefix_lens[batch]; }

  // What all but the window and the prefix say.
  bool allows(int batch, int head, int query, int key) const {
    if (!ids_.empty() && ids_[batch * seqlen_ + query] != ids_[batch * seqlen_ + key]) {
      return false;
    }
    return std::all_of(masks_.begin(), masks_.end(), [&](const Mask& mask) {
      return mask.bytes[mask.entries.at(batch, head, query >> mask.block_log2,
                                        key >> mask.block_log2)] != 0;
    });
  }

  const std::vector<float>& slopes() const { return slopes_; }  // (batch, heads) or (heads)
  const std::vector<float>& sinks() const { return sinks_; }    // (heads)
  const std::vector<int64_t>& rng_state() const { return rng_state_; }
  // Strides of slopes and of their gradient, without data.
  HeadValues slope_strides() const {
    return {nullptr, spec_.terms.alibi == Slopes::kOfAll ? num_heads_ : 0, 1};
  }
  double slope(int batch, int head) const {
    return slopes_.empty() ? 0 : slopes_[batch * slope_strides().batch_stride + head];
  }
  double sink(int head) const {
    return spec_.terms.sinks ? sinks_[head] : -std::numeric_limits<double>::infinity();
  }
  // By what dropout multiplies a probability.
  double kept(int batch, int head, int query, int key) const {
    if (spec_.terms.dropout_p == 0) {
      return 1;
    }
    const Dropout dropout = Dropout::of(spec_.terms.dropout_p, rng_state_.data());
    return DropoutOfHead(dropout, batch, head, num_heads_).keeps(query, key)
               ? static_cast<double>(dropout.scale)
               : 0;
  }

  // Of the elements of the bias's memory.
  std::vector<bool> is_entry_of_bias(const Shape& shape) const {
    std::vector<bool> is_entry(bias_.size());
    if (spec_.bias) {
      const Broadcast& over = spec_.bias->over;
      for (int b = 0; b < (over.batch ? 1 : shape.batch); ++b) {
        for (int h = 0; h < (over.head ? 1 : shape.num_heads); ++h) {
          for (int i = 0; i < (over.query ? 1 : shape.seqlen_q); ++i) {
            for (int j = 0; j < (over.key ? 1 : shape.seqlen_k); ++j) {
              is_entry[bias_entries_.at(b, h, i, j)] = true;
            }
          }
        }
      }
    }
    return is_entry;
  }

  double bias_of(int batch, int head, int query, int key) const {
    return bias_.empty() ? 0 : bias_[bias_entries_.at(batch, head, query, key)];
  }

 private:
  void draw_terms(const Shape& shape, std::mt19937& generator) {
    num_heads_ = shape.num_heads;
    std::uniform_real_distribution<float> uniform;
    const TermSpec& terms = spec_.terms;
    if (terms.alibi != Slopes::kNone) {
      slopes_.resize((terms.alibi == Slopes::kOfAll ? shape.batch : 1) * num_heads_);
      std::generate(slopes_.begin(), slopes_.end(), [&] { return 0.1f * uniform(generator); });
    }
    if (terms.sinks) {
      sinks_.resize(num_heads_);
      std::generate(sinks_.begin(), sinks_.end(), [&] { return 8 * uniform(generator) - 2; });
      if (num_heads_ > 1) {
        sinks_[1] = -std::numeric_limits<float>::infinity();  // none
      }
    }
    if (terms.dropout_p > 0) {
      rng_state_ = {static_cast<int64_t>(0x8765432187654321), 0x123456789ab};
    }
  }

  static Mask random_mask(const MaskSpec& spec, const Shape& shape, std::mt19937& generator) {
    std::uniform_real_distribution<double> uniform;
    const int block = 1 << spec.block_log2;
    const int queries = (shape.seqlen_q + block - 1) / block;
    const int keys = (shape.seqlen_k + block - 1) / block;
    Mask mask{
        place_entries(spec, shape.batch, shape.num_heads, queries, keys), spec.block_log2, {}};
    mask.bytes.resize(mask.entries.count, 1);
    for (int b = 0; b < (spec.over.batch ? 1 : shape.batch); ++b) {
      for (int h = 0; h < (spec.over.head ? 1 : shape.num_heads); ++h) {
        for (int i = 0; i < (spec.over.query ? 1 : queries); i += spec.grain) {
          for (int j = 0; j < (spec.over.key ? 1 : keys); j += spec.grain) {
            const uint8_t byte = uniform(generator) < spec.keep ? 1 + (i + j) % 3 : 0;
            for (int row = i; row < std::min(i + spec.grain, queries); ++row) {
              for (int col = j; col < std::min(j + spec.grain, keys); ++col) {
                mask.bytes[mask.entries.at(b, h, row, col)] = byte;
              }
            }
          }
        }
      }
    }
    return mask;
  }

  RuleSpec spec_;
  int seqlen_;
  Entries bias_entries_;
  std::vector<double> bias_;
  std::vector<Mask> masks_;
  std::vector<int32_t> ids_;
  int num_heads_ = 0;
  std::vector<float> slopes_;
  std::vector<float> sinks_;
  std::vector<int64_t> rng_state_;
};

}  // namespace fa::test
