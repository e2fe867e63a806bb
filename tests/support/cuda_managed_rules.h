// SPDX-License-Identifier: BSD-3-Clause
// Rules for scores in memory that host and device see.
#pragma once

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "tests/support/cuda_blocks.h"
#include "tests/support/cuda_rules.h"

namespace fa::test {

template <typename T>
std::unique_ptr<Managed<T>> managed(const std::vector<T>& values) {
  auto memory = std::make_unique<Managed<T>>(std::max(values.size(), size_t{1}));
  std::copy(values.begin(), values.end(), memory->data);
  return memory;
}

struct RuleCase {
  const char* name;
  Shape shape;
  RuleSpec rules;
  int left = -1;
  int right = -1;
  std::vector<int> lengths = {};  // of packed queries and of packed keys
};

// Rules where both sides see them.
class Rules {
 public:
  Rules(const RuleCase& test, std::mt19937& generator)
      : host_(test.rules, test.shape, generator),
        ids_(managed(host_.ids())),
        prefix_lens_(
            managed<int32_t>({test.rules.prefix_lens.begin(), test.rules.prefix_lens.end()})) {
    for (const HostRules::Mask& mask : host_.masks()) {
      masks_.push_back(managed(mask.bytes));
    }
    std::vector<float> bias(host_.bias().begin(), host_.bias().end());
    bias_ = managed(bias);
  }

  ScoreRules view() const {
    ScoreRules view;
    if (host_.spec().bias) {
      view.bias = host_.bias_entries().strides;
      view.bias.data = bias_->data;
    }
    for (size_t i = 0; i < masks_.size(); ++i) {
      view.masks[i] = {host_.masks()[i].entries.strides, host_.masks()[i].block_log2};
      view.masks[i].data = masks_[i]->data;
    }
    view.document_ids = host_.ids().empty() ? nullptr : ids_->data;
    view.document_stride = host_.seqlen();
    view.prefix_lens = host_.spec().prefix_lens.empty() ? nullptr : prefix_lens_->data;
    return view;
  }

 private:
  HostRules host_;
  std::unique_ptr<Managed<int32_t>> ids_;
  std::unique_ptr<Managed<int32_t>> prefix_lens_;
  std::vector<std::unique_ptr<Managed<uint8_t>>> masks_;
  std::unique_ptr<Managed<float>> bias_;
};

}  // namespace fa::test
