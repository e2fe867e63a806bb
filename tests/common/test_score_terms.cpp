// SPDX-License-Identifier: BSD-3-Clause
// The terms of a score: which of them count as given, what slopes are multiplied by, and where
// numbers of heads and partial sums lie.
#include "common/score_terms.h"

#include <cstdint>
#include <cstdlib>
#include <set>

#include "common/score_rules.h"
#include "tests/support/check.h"

namespace {

using namespace fa;

void check_any() {
  FA_EXPECT(!ScoreTerms{}.any());
  FA_EXPECT(!ScoreRules{}.any());
  float number = 0;
  const int64_t state[2] = {};
  const HeadValues values = {&number, 0, 1};
  const ScoreTerms with_one[] = {{.softcap = 30},
                                 {.alibi = values},
                                 {.sinks = values},
                                 {.dropout = Dropout::of(0.1, state)},
                                 {.max_logit = values}};
  for (const ScoreTerms& terms : with_one) {
    FA_EXPECT(terms.any());
    ScoreRules rules;
    rules.terms = terms;
    FA_EXPECT(rules.any());
    FA_EXPECT(!rules.has_data_masks());
  }
}

// The distance from the key that is aligned with the query, whatever the window.
void check_alibi_distance() {
  for (int seqlen_q = 1; seqlen_q < 9; ++seqlen_q) {
    for (int seqlen_k = 1; seqlen_k < 9; ++seqlen_k) {
      for (const long long side : {-1LL, 0LL, 2LL}) {
        const WindowMask window(seqlen_q, seqlen_k, side, side);
        for (int query = 0; query < seqlen_q; ++query) {
          for (int key = 0; key < seqlen_k; ++key) {
            FA_EXPECT_EQ(alibi_distance(window, query, key),
                         -std::abs(query + seqlen_k - seqlen_q - key), seqlen_q, seqlen_k, query,
                         key);
          }
        }
        FA_EXPECT_EQ(alibi_distance(window, seqlen_q - 1, seqlen_k - 1), 0);
      }
    }
  }
}

void check_numbers_of_heads() {
  float numbers[30];
  const HeadValues of_all = {numbers, 10, 2};
  const HeadValues of_heads = {numbers, 0, 3};
  for (int batch = 0; batch < 3; ++batch) {
    for (int head = 0; head < 5; ++head) {
      FA_EXPECT_EQ(&of_all.at<float>(batch, head) - numbers, batch * 10 + head * 2);
      FA_EXPECT_EQ(&of_heads.at<float>(batch, head) - numbers, head * 3);
    }
  }
  double partial[20];
  const HeadGradient gradient = {{}, partial, 4};
  std::set<double*> places;
  for (int head = 0; head < 5; ++head) {
    for (int tile = 0; tile < 4; ++tile) {
      places.insert(&gradient.at<double>(head, tile));
    }
  }
  FA_EXPECT_EQ(places.size(), 20u);
  FA_EXPECT(*places.begin() == partial && *places.rbegin() == partial + 19);
}

}  // namespace

int main() {
  check_any();
  check_alibi_distance();
  check_numbers_of_heads();
  return fa::test::report("common/test_score_terms");
}
