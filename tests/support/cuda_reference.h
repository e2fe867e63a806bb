// SPDX-License-Identifier: BSD-3-Clause
// Attention and its gradients as the formulas say, in double.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "tests/support/cuda_cases.h"

namespace fa::test {

// body(i) for i in [0, count), on the threads of the host.
template <typename Body>
void in_parallel(int64_t count, const Body& body) {
  constexpr int64_t kChunk = 64;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(kChunk)) < count;) {
      for (int64_t i = begin; i < std::min(begin + kChunk, count); ++i) {
        body(i);
      }
    }
  };
  std::vector<std::thread> threads;
  const int64_t most = std::max(std::thread::hardware_concurrency(), 1u);
  for (int64_t i = 1; i < std::min(most, (count + kChunk - 1) / kChunk); ++i) {
    threads.emplace_back(work);
  }
  work();
  for (std::thread& thread : threads) {
    thread.join();
  }
}

// Elements in the order (sequence, row, head, column), rows that do not count left out.
struct Inputs {
  std::vector<double> q, k, v, dout, dlse;
};
struct Reference {
  std::vector<double> out, lse, dq, dk, dv;
  std::vector<double> dbias;      // where the bias has entries
  std::vector<double> dslopes;    // like the slopes
  std::vector<double> dsinks;     // (heads)
  std::vector<double> max_logit;  // (heads)
};

inline bool visible(const Case& test, int query, int key, int queries, int keys) {
  const int relative = key - query - (keys - queries);  // to the diagonal that ends bottom right
  return (test.left < 0 || relative >= -test.left) && (test.right < 0 || relative <= test.right);
}

class NaiveAttention {
 public:
  NaiveAttention(const Case& test, const HostRules& rules, const std::vector<int>& lengths_q,
                 const std::vector<int>& lengths_k)
      : test_(test), rules_(rules), queries_(rows_of(lengths_q)), keys_(rows_of(lengths_k)) {
    int64_t pairs = 0;
    for (size_t b = 0; b < lengths_q.size(); ++b) {
      first_pair_.push_back(pairs);
      pairs += int64_t{lengths_q[b]} * lengths_k[b];
    }
    p_.resize(pairs * test.shape.num_heads);
    ds_.resize(p_.size());
    cap_.resize(test.rules.terms.softcap == 0 ? 0 : p_.size());
  }

  Reference run(const Inputs& x) {
    const Shape& shape = test_.shape;
    Reference result{std::vector<double>(x.dout.size()),
                     std::vector<double>(x.dlse.size()),
                     std::vector<double>(x.q.size()),
                     std::vector<double>(x.k.size()),
                     std::vector<double>(x.v.size()),
                     {},
                     std::vector<double>(rules_.slopes().size()),
                     std::vector<double>(rules_.sinks().size()),
                     std::vector<double>(shape.num_heads, -INFINITY)};
    of_rows_.resize(x.dlse.size());
    in_parallel(queries_.count() * shape.num_heads, [&](int64_t i) {
      run_query(x, result, i / shape.num_heads, static_cast<int>(i % shape.num_heads));
    });
    in_parallel(keys_.count() * shape.num_heads_kv, [&](int64_t i) {
      run_key(x, result, i / shape.num_heads_kv, static_cast<int>(i % shape.num_heads_kv));
    });
    result.dbias = sum_dbias();
    for (size_t i = 0; i < of_rows_.size(); ++i) {
      const int b = queries_.sequence[i / shape.num_heads];
      const int head = static_cast<int>(i % shape.num_heads);
      result.max_logit[head] = std::max(result.max_logit[head], of_rows_[i].largest);
      if (!result.dslopes.empty()) {
        result.dslopes[b * rules_.slope_strides().batch_stride + head] += of_rows_[i].dslope;
      }
      if (!result.dsinks.empty()) {
        result.dsinks[head] += of_rows_[i].dsink;
      }
    }
    return result;
  }

  // Which entries of the bias some seen pair has.
  std::vector<bool> bias_seen() const {
    std::vector<bool> seen(rules_.bias().size());
    each_pair([&](int b, int head, int query, int key, size_t) {
      if (sees(b, head, query, key)) {
        seen[rules_.bias_entries().at(b, head, query, key)] = true;
      }
    });
    return seen;
  }

 private:
  // The rows of all sequences, one after another.
  struct Rows {
    std::vector<int64_t> first;  // of each sequence, and the end
    std::vector<int> sequence;   // of each row

    int64_t count() const { return first.back(); }
    int length(int b) const { return static_cast<int>(first[b + 1] - first[b]); }
  };

  static Rows rows_of(const std::vector<int>& lengths) {
    Rows rows;
    rows.first.push_back(0);
    for (size_t b = 0; b < lengths.size(); ++b) {
      rows.first.push_back(rows.first.back() + lengths[b]);
      rows.sequence.insert(rows.sequence.end(), lengths[b], static_cast<int>(b));
    }
    return rows;
  }

  // What a query of a head adds to results of its head.
  struct OfRow {
    double dslope = 0;
    double dsink = 0;
    double largest = -INFINITY;  // score
  };

  // Where p and ds of a query and all its keys lie.
  size_t pairs_of(int64_t row, int head) const {
    const int b = queries_.sequence[row];
    return first_pair_[b] * test_.shape.num_heads +
           (int64_t{head} * queries_.length(b) + row - queries_.first[b]) * keys_.length(b);
  }

  static double dot(const double* a, const double* b, int cols) {
    double sum = 0;
    for (int c = 0; c < cols; ++c) {
      sum += a[c] * b[c];
    }
    return sum;
  }
  static void add(double* sum, double factor, const double* x, int cols) {
    for (int c = 0; c < cols; ++c) {
      sum[c] += factor * x[c];
    }
  }

  bool sees(int b, int head, int query, int key) const {
    return (key < rules_.prefix(b) ||
            visible(test_, query, key, queries_.length(b), keys_.length(b))) &&
           rules_.allows(b, head, query, key);
  }

  // visit(sequence, head, query, key, index into p_ and ds_)
  template <typename Visit>
  void each_pair(const Visit& visit) const {
    if (rules_.bias().empty()) {
      return;
    }
    for (int64_t row = 0; row < queries_.count(); ++row) {
      const int b = queries_.sequence[row];
      for (int head = 0; head < test_.shape.num_heads; ++head) {
        for (int key = 0; key < keys_.length(b); ++key) {
          visit(b, head, static_cast<int>(row - queries_.first[b]), key, pairs_of(row, head) + key);
        }
      }
    }
  }

  std::vector<double> sum_dbias() const {
    std::vector<double> dbias(rules_.bias().size());
    each_pair([&](int b, int head, int query, int key, size_t pair) {
      dbias[rules_.bias_entries().at(b, head, query, key)] += p_[pair] == 0 ? 0 : ds_[pair];
    });
    return dbias;
  }

  void run_query(const Inputs& x, Reference& result, int64_t row, int head) {
    const Shape& shape = test_.shape;
    const double scale = test_.softmax_scale();
    const int b = queries_.sequence[row];
    const int keys = keys_.length(b);
    const int query = static_cast<int>(row - queries_.first[b]);
    const size_t statistic = row * shape.num_heads + head;
    const double* q_row = &x.q[statistic * shape.head_dim];
    const double* dout_row = &x.dout[statistic * shape.head_dim_v];
    const auto row_of = [&](const std::vector<double>& tensor, int key, int cols) {
      return &tensor[((keys_.first[b] + key) * shape.num_heads_kv + head / shape.group_size()) *
                     cols];
    };
    double* p = p_.data() + pairs_of(row, head);
    double* ds = ds_.data() + pairs_of(row, head);
    double* cap = cap_.empty() ? nullptr : cap_.data() + pairs_of(row, head);
    const auto distance = [&](int key) {
      return std::abs(query + keys - queries_.length(b) - key);
    };
    OfRow& of_row = of_rows_[statistic];
    for (int key = 0; key < keys; ++key) {
      double score = scale * dot(q_row, row_of(x.k, key, shape.head_dim), shape.head_dim);
      if (cap != nullptr) {
        const double softcap = test_.rules.terms.softcap;
        const double tanh = std::tanh(score / softcap);
        score = softcap * tanh;
        cap[key] = 1 - tanh * tanh;
      }
      score += rules_.bias_of(b, head, query, key) - rules_.slope(b, head) * distance(key);
      p[key] = sees(b, head, query, key) ? score : -INFINITY;
      of_row.largest = std::max(of_row.largest, p[key]);
    }
    const double sink = rules_.sink(head);
    const double largest = std::max(of_row.largest, sink);
    double sum = sink == -INFINITY ? 0 : std::exp(sink - largest);
    for (int key = 0; key < keys; ++key) {
      p[key] = p[key] == -INFINITY ? 0 : std::exp(p[key] - largest);
      sum += p[key];
    }
    const double lse = largest + std::log(sum);  // -inf where no key is seen
    result.lse[statistic] = lse;
    double delta = -x.dlse[statistic];
    for (int key = 0; key < keys; ++key) {
      if (p[key] != 0) {
        p[key] /= sum;
        const double kept = rules_.kept(b, head, query, key);
        const double* v_row = row_of(x.v, key, shape.head_dim_v);
        ds[key] = kept * dot(dout_row, v_row, shape.head_dim_v);
        delta += p[key] * ds[key];
        add(&result.out[statistic * shape.head_dim_v], kept * p[key], v_row, shape.head_dim_v);
      }
    }
    for (int key = 0; key < keys; ++key) {
      if (p[key] != 0) {
        ds[key] = p[key] * (ds[key] - delta);
        of_row.dslope -= ds[key] * distance(key);
        add(&result.dq[statistic * shape.head_dim], of_product(&ds[key]),
            row_of(x.k, key, shape.head_dim), shape.head_dim);
      }
    }
    of_row.dsink = sink == -INFINITY ? 0 : -std::exp(sink - lse) * delta;
  }

  // The gradient of a product of a query and a key, of an element of ds_.
  double of_product(const double* ds) const {
    return test_.softmax_scale() * *ds * (cap_.empty() ? 1 : cap_[ds - ds_.data()]);
  }

  void run_key(const Inputs& x, Reference& result, int64_t row, int head) const {
    const Shape& shape = test_.shape;
    const int b = keys_.sequence[row];
    const size_t k_row = row * shape.num_heads_kv + head;
    for (int64_t query = queries_.first[b]; query < queries_.first[b + 1]; ++query) {
      for (int i = 0; i < shape.group_size(); ++i) {
        const int head_q = head * shape.group_size() + i;
        const size_t pair = pairs_of(query, head_q) + row - keys_.first[b];
        if (p_[pair] != 0) {
          const size_t q_row = query * shape.num_heads + head_q;
          const double kept = rules_.kept(b, head_q, static_cast<int>(query - queries_.first[b]),
                                          static_cast<int>(row - keys_.first[b]));
          add(&result.dv[k_row * shape.head_dim_v], kept * p_[pair],
              &x.dout[q_row * shape.head_dim_v], shape.head_dim_v);
          add(&result.dk[k_row * shape.head_dim], of_product(&ds_[pair]),
              &x.q[q_row * shape.head_dim], shape.head_dim);
        }
      }
    }
  }

  const Case& test_;
  const HostRules& rules_;
  Rows queries_;
  Rows keys_;
  std::vector<int64_t> first_pair_;  // of each sequence, for one head
  std::vector<double> p_;            // (sequence, head, query, key)
  std::vector<double> ds_;
  std::vector<double> cap_;     // the slope of a softcap at its product; empty without one
  std::vector<OfRow> of_rows_;  // (row, head)
};

}  // namespace fa::test
