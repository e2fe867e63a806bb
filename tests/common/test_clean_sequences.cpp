// SPDX-License-Identifier: BSD-3-Clause
// Whatever lengths a caller gives, kernels get sequences that lie in their tensor one after
// another; and lengths that were right stay as they were.
#include "common/clean_sequences.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "tests/support/check.h"

namespace {

struct Cleaned {
  std::vector<int32_t> cu_seqlens;
  std::vector<int32_t> seqused;
};

// Empty vectors stand for null.
Cleaned clean(const std::vector<int32_t>& cu_seqlens, const std::vector<int32_t>& seqused,
              int batch, int rows, int longest) {
  Cleaned cleaned = {cu_seqlens, std::vector<int32_t>(batch)};
  fa::clean_sequences({.cu_seqlens = cu_seqlens.empty() ? nullptr : cu_seqlens.data(),
                       .seqused = seqused.empty() ? nullptr : seqused.data(),
                       .batch = batch,
                       .rows = rows,
                       .longest = longest,
                       .clean_cu_seqlens = cu_seqlens.empty() ? nullptr : cleaned.cu_seqlens.data(),
                       .clean_seqused = cleaned.seqused.data()});
  return cleaned;
}

void expect_sound(const Cleaned& cleaned, int batch, int rows, int longest) {
  for (int b = 0; b < batch; ++b) {
    int begin = 0;
    int end = rows;
    if (!cleaned.cu_seqlens.empty()) {
      begin = cleaned.cu_seqlens[b];
      end = cleaned.cu_seqlens[b + 1];
    }
    FA_EXPECT(0 <= begin && begin <= end && end <= rows, "batch", b, "begin", begin, "end", end,
              "rows", rows);
    const int length = cleaned.seqused[b];
    FA_EXPECT(0 <= length && length <= std::min(end - begin, longest), "batch", b, "length", length,
              "of", end - begin, "longest", longest);
  }
}

void check_anything() {
  std::mt19937 random(0);
  constexpr int32_t kEnds[] = {std::numeric_limits<int32_t>::min(), -1, 0, 1,
                               std::numeric_limits<int32_t>::max()};
  for (int trial = 0; trial < 20000; ++trial) {
    const int batch = random() % 5;
    const int rows = random() % 20;
    const int longest = random() % 20;
    const auto draw = [&](int count) {
      std::vector<int32_t> numbers(count);
      for (int32_t& number : numbers) {
        number = random() % 3 == 0 ? kEnds[random() % 5] : static_cast<int32_t>(random() % 30) - 5;
      }
      return numbers;
    };
    const auto cu_seqlens = draw(random() % 4 == 0 ? 0 : batch + 1);
    const auto seqused = draw(random() % 4 == 0 ? 0 : batch);
    expect_sound(clean(cu_seqlens, seqused, batch, rows, longest), batch, rows, longest);
  }
}

void check_valid_stays() {
  std::mt19937 random(0);
  for (int trial = 0; trial < 2000; ++trial) {
    const int batch = random() % 6;
    std::vector<int32_t> cu_seqlens = {static_cast<int32_t>(random() % 4)};
    std::vector<int32_t> lengths;
    std::vector<int32_t> seqused;
    for (int b = 0; b < batch; ++b) {
      lengths.push_back(random() % 3 == 0 ? 0 : random() % 100);
      seqused.push_back(random() % (lengths.back() + 1));
      cu_seqlens.push_back(cu_seqlens.back() + lengths.back());
    }
    const int rows = cu_seqlens.back() + random() % 4;
    const Cleaned whole = clean(cu_seqlens, {}, batch, rows, rows);
    FA_EXPECT(whole.cu_seqlens == cu_seqlens && whole.seqused == lengths, "trial", trial);
    const Cleaned used = clean(cu_seqlens, seqused, batch, rows, rows);
    FA_EXPECT(used.cu_seqlens == cu_seqlens && used.seqused == seqused, "trial", trial);
    const Cleaned dense = clean({}, seqused, batch, 100, 100);
    FA_EXPECT(dense.seqused == seqused, "trial", trial);
  }
}

void check_examples() {
  const Cleaned falling = clean({2, 9, 4, 50}, {}, 3, 12, 12);
  FA_EXPECT(falling.cu_seqlens == (std::vector<int32_t>{2, 9, 9, 12}));
  FA_EXPECT(falling.seqused == (std::vector<int32_t>{7, 0, 3}));
  const Cleaned bounded = clean({0, 8, 12}, {9, -3}, 2, 12, 5);
  FA_EXPECT(bounded.cu_seqlens == (std::vector<int32_t>{0, 8, 12}));
  FA_EXPECT(bounded.seqused == (std::vector<int32_t>{5, 0}));
}

}  // namespace

int main() {
  check_anything();
  check_valid_stays();
  check_examples();
  return fa::test::report("common/test_clean_sequences");
}
