// SPDX-License-Identifier: BSD-3-Clause
// The attention problems that every CUDA row of the kernel table must solve.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "common/params.h"
#include "tests/support/cuda_rules.h"

namespace fa::test {

// All but kContiguous leave gaps between rows and between batch entries.
enum class Layout { kContiguous, kPadded, kHeadsFirst };

// As head_dim of a case: the case stands for one with each head_dim of the table.
inline constexpr int kOfRow = 0;

struct Case {
  const char* name;
  Shape shape;  // lengths of the longest sequences where they differ; head_dim_v 0: as head_dim
  int left = -1;
  int right = -1;
  Layout layout = Layout::kPadded;
  std::optional<double> scale = std::nullopt;  // default: 1 / sqrt(head_dim)
  float magnitude = 1.0f;                      // of q
  // Softmax near one-hot makes gradients small differences of large numbers.
  double gradient_slack = 1.0;
  bool dlse = false;
  std::vector<int> lengths_q = {};  // of packed sequences
  std::vector<int> lengths_k = {};
  std::vector<int> used_q = {};  // how many rows of each sequence count
  std::vector<int> used_k = {};
  RuleSpec rules = {};
  bool total_lengths = false;  // kernels are told all rows of packed tensors as lengths
  bool every_row = false;      // and not only the rows whose head_dim is the least that fits
  bool small = false;          // among those that a slow checker runs
  int repeats = 1;             // of the deterministic pass, which must give the same bits

  double softmax_scale() const { return scale.value_or(1.0 / std::sqrt(shape.head_dim)); }
};

// More work items than one launch has blocks.
inline const Case kManyWorkItems = {
    .name = "many", .shape = {1100, 1024, 1024, 1, 1, 8}, .layout = Layout::kContiguous};

inline std::vector<Case> fixed_length_cases() {
  return {
      {.name = "one",
       .shape = {1, 1, 1, 1, 1, 8},
       .dlse = true,  // else gradients are no more than rounding errors
       .every_row = true},
      {.name = "tile", .shape = {1, 1, 1, 128, 128, kOfRow}, .layout = Layout::kContiguous},
      {.name = "small", .shape = {2, 2, 1, 33, 70, kOfRow}, .right = 0, .small = true},
      {.name = "tails", .shape = {2, 4, 2, 65, 129, kOfRow}, .layout = Layout::kHeadsFirst},
      {.name = "causal", .shape = {2, 4, 2, 130, 200, kOfRow}, .right = 0, .dlse = true},
      {.name = "causal, more queries", .shape = {1, 4, 1, 200, 130, kOfRow}, .right = 0},
      {.name = "window 7 3", .shape = {1, 4, 2, 150, 170, kOfRow}, .left = 7, .right = 3},
      {.name = "long", .shape = {1, 4, 2, 300, 700, kOfRow}, .right = 0, .repeats = 20},
      {.name = "long full",
       .shape = {1, 2, 1, 300, 700, kOfRow},
       .layout = Layout::kContiguous,
       .repeats = 20},
      {.name = "tails 63 65", .shape = {2, 2, 2, 63, 65, 40}, .every_row = true},
      {.name = "tails 127 1", .shape = {1, 2, 1, 127, 1, 64}, .dlse = true},
      {.name = "tails 1 127", .shape = {2, 4, 2, 1, 127, 96}},
      {.name = "d72", .shape = {1, 4, 2, 130, 200, 72}},
      {.name = "d104", .shape = {1, 4, 2, 130, 200, 104}, .right = 0},
      {.name = "d136", .shape = {1, 4, 2, 70, 90, 136}},
      {.name = "d160", .shape = {1, 4, 2, 130, 200, 160}, .right = 0},
      {.name = "d200", .shape = {1, 4, 2, 130, 200, 200}, .right = 0},
      {.name = "d264", .shape = {1, 4, 2, 130, 200, 264}, .right = 0},
      {.name = "d328", .shape = {1, 2, 1, 70, 90, 328}, .layout = Layout::kHeadsFirst},
      {.name = "contiguous", .shape = {2, 2, 2, 100, 70, 64}, .layout = Layout::kContiguous},
      {.name = "causal 127 63", .shape = {2, 2, 2, 127, 63, 64}, .right = 0},
      {.name = "causal 65 191", .shape = {2, 4, 2, 65, 191, 128}, .right = 0},
      {.name = "causal 200 200",
       .shape = {1, 4, 1, 200, 200, 64},
       .right = 0,
       .layout = Layout::kHeadsFirst},
      {.name = "causal 129 40", .shape = {1, 2, 2, 129, 40, 8}, .right = 0, .every_row = true},
      {.name = "causal 1000 7", .shape = {1, 2, 1, 1000, 7, 32}, .right = 0},
      {.name = "window 7 3 d40", .shape = {2, 4, 2, 130, 150, 40}, .left = 7, .right = 3},
      {.name = "window 0 0", .shape = {1, 2, 1, 70, 70, 128}, .left = 0, .right = 0, .dlse = true},
      {.name = "window 100 -1", .shape = {1, 2, 1, 190, 190, 64}, .left = 100},
      {.name = "window 5 80", .shape = {1, 2, 1, 190, 190, 64}, .left = 5, .right = 80},
      {.name = "window sees nothing", .shape = {1, 2, 1, 300, 20, 72}, .left = 2, .right = 1},
      {.name = "window leaves out keys", .shape = {1, 2, 1, 20, 300, 72}, .left = 2, .right = 1},
      {.name = "no keys", .shape = {2, 2, 1, 70, 0, 64}, .every_row = true},
      {.name = "no keys, causal", .shape = {1, 2, 2, 70, 0, 128}, .right = 0, .dlse = true},
      {.name = "no queries", .shape = {1, 2, 2, 0, 70, 64}, .every_row = true},
      {.name = "no batch", .shape = {0, 2, 2, 70, 70, 64}},
      {.name = "large scores",
       .shape = {1, 2, 2, 66, 130, kOfRow},
       .magnitude = 20.0f,
       .gradient_slack = 10},
      {.name = "huge scores",
       .shape = {1, 2, 2, 66, 130, 64},
       .right = 0,
       .magnitude = 500.0f,
       .dlse = true},  // else gradients nearly vanish, and rounding errors are as large
      {.name = "dlse", .shape = {2, 4, 2, 100, 90, 64}, .dlse = true},
      {.name = "negative scale",
       .shape = {1, 2, 2, 70, 90, kOfRow},
       .left = 40,
       .right = 0,
       .scale = -0.2},
      {.name = "zero scale", .shape = {1, 2, 2, 70, 90, kOfRow}, .left = 40, .scale = 0.0},
      {.name = "several tiles of several heads for each block",
       .shape = {5, 60, 12, 130, 260, kOfRow},
       .right = 0},
      {.name = "single tiles of several heads for each block",
       .shape = {4, 80, 16, 65, 70, kOfRow}},
      {.name = "three tiles of several heads for each block",
       .shape = {4, 80, 16, 65, 170, kOfRow}},
      {.name = "rows that see nothing among several heads for each block",
       .shape = {4, 80, 16, 130, 40, kOfRow},
       .right = 0},
      {.name = "70000 heads", .shape = {4375, 16, 8, 3, 2, 8}, .right = 0},
  };
}

inline std::vector<Case> variable_length_cases() {
  return {
      {.name = "packed, small",
       .shape = {4, 2, 1, 33, 40, kOfRow},
       .right = 0,
       .lengths_q = {17, 0, 33, 1},
       .lengths_k = {40, 9, 16, 0},
       .small = true},
      {.name = "packed and used, small",
       .shape = {3, 2, 1, 40, 40, 40},
       .left = 9,
       .right = 2,
       .lengths_q = {20, 40, 3},
       .lengths_k = {30, 12, 40},
       .used_q = {20, 31, 0},
       .used_k = {17, 12, 33},
       .every_row = true,
       .small = true},
      {.name = "packed",
       .shape = {8, 4, 2, 200, 200, kOfRow},
       .layout = Layout::kContiguous,
       .lengths_q = {0, 1, 63, 64, 65, 200, 0, 5},
       .lengths_k = {65, 200, 64, 0, 63, 1, 0, 90},
       .repeats = 20},
      {.name = "packed, several tiles of several heads for each block",
       .shape = {5, 40, 8, 300, 300, 64},
       .left = 150,
       .right = 0,
       .lengths_q = {130, 0, 300, 1, 129},
       .lengths_k = {260, 70, 300, 150, 0}},
      {.name = "packed, causal",
       .shape = {7, 4, 1, 200, 200, kOfRow},
       .right = 0,
       .layout = Layout::kHeadsFirst,
       .dlse = true,
       .lengths_q = {64, 200, 1, 0, 63, 65, 129},
       .lengths_k = {64, 63, 200, 65, 1, 130, 129},
       .repeats = 20},
      {.name = "packed, window",
       .shape = {5, 2, 2, 300, 256, 96},  // room for longer sequences
       .left = 20,
       .right = 5,
       .lengths_q = {200, 65, 0, 64, 1},
       .lengths_k = {200, 129, 64, 40, 1}},
      {.name = "packed, one", .shape = {1, 2, 1, 70, 90, 64}, .lengths_q = {70}, .lengths_k = {90}},
      {.name = "packed, nothing",
       .shape = {3, 2, 1, 70, 90, 64},
       .lengths_q = {0, 0, 0},
       .lengths_k = {0, 0, 0}},
      {.name = "packed queries only",
       .shape = {3, 4, 2, 100, 90, 128},
       .right = 0,
       .lengths_q = {100, 0, 31}},
      {.name = "packed keys only",
       .shape = {3, 4, 2, 90, 100, 64},
       .right = 0,
       .lengths_k = {100, 0, 31}},
      {.name = "used",
       .shape = {6, 4, 2, 200, 200, kOfRow},
       .used_q = {0, 1, 63, 64, 65, 200},
       .used_k = {65, 200, 64, 0, 63, 1}},
      {.name = "used, causal",
       .shape = {6, 4, 1, 150, 220, 64},
       .right = 0,
       .layout = Layout::kHeadsFirst,
       .dlse = true,
       .used_q = {150, 1, 63, 64, 129, 0},
       .used_k = {150, 220, 64, 65, 1, 33},
       .every_row = true},
      {.name = "used keys only",
       .shape = {4, 4, 2, 1, 200, 128},
       .right = 0,
       .used_k = {200, 1, 0, 77}},
      {.name = "used, window",
       .shape = {4, 2, 1, 200, 200, 72},
       .left = 30,
       .right = 4,
       .used_q = {128, 100, 3, 200},
       .used_k = {128, 190, 200, 60}},
      {.name = "packed and used",
       .shape = {7, 4, 2, 200, 200, kOfRow},
       .right = 0,
       .dlse = true,
       .lengths_q = {0, 1, 63, 64, 65, 200, 100},
       .lengths_k = {10, 200, 64, 5, 63, 130, 100},
       .used_q = {0, 1, 40, 64, 0, 129, 33},
       .used_k = {10, 63, 0, 5, 63, 64, 100}},
  };
}

// Values have a head_dim of their own.
inline std::vector<Case> head_dim_v_cases() {
  return {
      {.name = "d64 v40", .shape = {2, 4, 2, 130, 200, 64, 40}, .right = 0, .small = true},
      {.name = "d40 v64", .shape = {2, 4, 2, 65, 129, 40, 64}, .dlse = true, .every_row = true},
      {.name = "d96 v128", .shape = {1, 4, 2, 130, 200, 96, 128}, .right = 0},
      {.name = "d192 v128", .shape = {1, 4, 2, 130, 200, 192, 128}, .right = 0, .repeats = 20},
      {.name = "d8 v256", .shape = {1, 2, 1, 70, 90, 8, 256}, .layout = Layout::kHeadsFirst},
      {.name = "d512 v8", .shape = {1, 2, 1, 70, 90, 512, 8}},
      {.name = "packed, d64 v128",
       .shape = {4, 4, 2, 200, 200, 64, 128},
       .right = 0,
       .lengths_q = {64, 200, 0, 65},
       .lengths_k = {200, 63, 1, 130}},
  };
}

// Tiles of keys by the hundred, so that every block of Hopper's kernels for backward has several.
inline std::vector<Case> rules_in_many_tiles() {
  std::vector<Case> cases;
  for (const int head_dim : {64, 128, 256}) {
    const std::vector<Case> of_head_dim = {
        {.name = "mask, several tiles of keys for each block",
         .shape = {6, 48, 24, 200, 200, head_dim},
         .rules = {.masks = {{.grain = 12, .keep = 0.6}}},
         .repeats = 10},
        {.name = "documents, several tiles of keys for each block",
         .shape = {6, 24, 24, 200, 200, head_dim},
         .right = 0,
         .rules = {.documents = 3},
         .repeats = 10},
        {.name = "prefix, several tiles of keys for each block",
         .shape = {6, 48, 24, 150, 200, head_dim},
         .left = 50,
         .right = 0,
         .rules = {.prefix_lens = {0, 70, 1, 1000, 129, 40}},
         .repeats = 10},
        {.name = "bias, several tiles of keys for each block",
         .shape = {6, 24, 24, 200, 200, head_dim},
         .left = 150,
         .right = 100,
         .rules = {.bias = BiasSpec{.minus_infinity = 0.1}},
         .repeats = 10},
    };
    cases.insert(cases.end(), of_head_dim.begin(), of_head_dim.end());
  }
  return cases;
}

inline std::vector<Case> rule_cases() {
  constexpr Broadcast kOneMatrix = {.batch = true, .head = true};
  const std::vector<Case> cases = {
      {.name = "bias, small",
       .shape = {2, 2, 1, 33, 70, kOfRow},
       .right = 0,
       .rules = {.bias = BiasSpec{}},
       .small = true},
      {.name = "bias",
       .shape = {2, 4, 2, 130, 200, kOfRow},
       .dlse = true,
       .rules = {.bias = BiasSpec{.minus_infinity = 0.2}},
       .repeats = 5},
      {.name = "bias of one matrix, bfloat16",
       .shape = {3, 4, 2, 130, 200, kOfRow},
       .left = 60,
       .right = 10,
       .rules = {.bias = BiasSpec{kOneMatrix, Dtype::kBFloat16}}},
      {.name = "bias of heads, float16, queries last",
       .shape = {3, 4, 1, 130, 200, 64},
       .rules = {.bias = BiasSpec{{.batch = true}, Dtype::kFloat16, true}}},
      {.name = "bias of keys",
       .shape = {2, 4, 2, 150, 170, 64},
       .right = 0,
       .rules = {.bias = BiasSpec{{.head = true, .query = true}}}},
      {.name = "bias of queries",
       .shape = {2, 2, 2, 150, 170, 128},
       .dlse = true,  // else the gradient is no more than rounding errors
       .rules = {.bias = BiasSpec{{.batch = true, .key = true}}}},
      {.name = "bias of all",
       .shape = {2, 2, 2, 70, 90, 64},
       .dlse = true,  // else the gradient is no more than rounding errors
       .rules = {.bias = BiasSpec{{true, true, true, true}}}},
      {.name = "bias, negative scale",
       .shape = {1, 2, 2, 70, 90, kOfRow},
       .scale = -0.2,
       .rules = {.bias = BiasSpec{}}},
      {.name = "bias, zero scale",
       .shape = {1, 2, 2, 70, 90, kOfRow},
       .right = 0,
       .scale = 0.0,
       .rules = {.bias = BiasSpec{}}},
      {.name = "bias of rows that overlap, bfloat16",
       .shape = {2, 4, 2, 130, 200, 64},
       .rules = {.bias = BiasSpec{.dtype = Dtype::kBFloat16, .step = 1}}},
      {.name = "bias of rows that overlap by multiples of 16 bytes, bfloat16",
       .shape = {2, 4, 2, 130, 200, 128},
       .rules = {.bias = BiasSpec{.dtype = Dtype::kBFloat16, .step = 8}}},
      {.name = "bias in strips, bfloat16",  // of tiles, more than there are blocks
       .shape = {2, 64, 8, 304, 304, 32},
       .right = 0,
       .rules = {.bias = BiasSpec{.dtype = Dtype::kBFloat16}}},
      {.name = "bias of heads in many tiles, float16",
       .shape = {2, 16, 4, 392, 392, 104},
       .left = 200,
       .right = 200,
       .rules = {.bias = BiasSpec{{.batch = true}, Dtype::kFloat16}}},
      {.name = "mask, small",
       .shape = {2, 2, 1, 40, 70, kOfRow},
       .rules = {.masks = {{}}},
       .small = true},
      {.name = "mask of one matrix in large squares",
       .shape = {2, 4, 2, 300, 700, kOfRow},
       .dlse = true,
       .rules = {.masks = {{.over = kOneMatrix, .grain = 128, .keep = 0.4}}},
       .repeats = 20},
      {.name = "mask of heads in squares, causal",
       .shape = {1, 4, 2, 300, 400, kOfRow},
       .right = 0,
       .rules = {.masks = {{.over = {.batch = true}, .grain = 32, .keep = 0.5}}},
       .repeats = 20},
      {.name = "masks of keys, of queries and of blocks, queries last",
       .shape = {2, 2, 1, 270, 300, 64},
       .rules = {.masks = {{.over = {.head = true, .query = true}},
                           {.over = {.batch = true, .key = true}},
                           {.block_log2 = 7, .queries_last = true}}}},
      // Too small for what bits of all its tiles would take.
      {.name = "mask of few queries in many heads",
       .shape = {4, 48, 6, 5, 1000, kOfRow},
       .rules = {.masks = {{.keep = 0.5}}}},
      {.name = "mask of rows that overlap in many heads",
       .shape = {2, 32, 8, 300, 400, 64},
       .right = 0,
       .rules = {.masks = {{.keep = 0.5, .step = 1}}}},
      {.name = "mask of rows that overlap in many heads, with documents and a bias",
       .shape = {2, 40, 8, 300, 300, 128},
       .rules = {.bias = BiasSpec{{.batch = true}, Dtype::kBFloat16},
                 .masks = {{.keep = 0.5, .step = 1}},
                 .documents = 2}},
      {.name = "mask hides all",
       .shape = {1, 2, 1, 70, 90, kOfRow},
       .rules = {.masks = {{.keep = 0.0}}}},
      {.name = "documents",
       .shape = {2, 4, 2, 400, 400, kOfRow},
       .right = 0,
       .rules = {.documents = 5},
       .repeats = 20},
      {.name = "documents, small",
       .shape = {2, 2, 1, 40, 40, 64},
       .rules = {.documents = 3},
       .small = true},
      {.name = "prefix",
       .shape = {4, 4, 2, 200, 300, kOfRow},
       .left = 30,
       .right = 0,
       .rules = {.prefix_lens = {0, 70, 1, 1000}},
       .repeats = 20},
      {.name = "bias, mask, documents and prefix",
       .shape = {2, 4, 2, 300, 300, kOfRow, 64},
       .left = 100,
       .right = 0,
       .dlse = true,
       .rules = {.bias = BiasSpec{.over = {.head = true}},
                 .masks = {{.over = kOneMatrix, .grain = 20}},
                 .documents = 2,
                 .prefix_lens = {90, 20}},
       .repeats = 5},
      {.name = "packed, bias and mask",
       .shape = {5, 4, 2, 200, 200, kOfRow},
       .right = 0,
       .gradient_slack = 2,  // the first queries see few keys
       .lengths_q = {64, 200, 0, 65, 1},
       .lengths_k = {200, 63, 1, 130, 0},
       .rules = {.bias = BiasSpec{.over = {.head = true}},
                 .masks = {{.over = {.batch = true}, .grain = 64, .keep = 0.5}}},
       .repeats = 5},
      {.name = "packed, bias of heads, float16, and mask",
       .shape = {5, 4, 2, 200, 200, kOfRow},
       .lengths_q = {64, 200, 0, 65, 1},
       .lengths_k = {200, 63, 1, 130, 0},
       .rules = {.bias = BiasSpec{{.batch = true}, Dtype::kFloat16},
                 .masks = {{.over = {.batch = true, .head = true}, .grain = 64, .keep = 0.5}}}},
      {.name = "used, bias of one matrix",
       .shape = {4, 4, 2, 200, 200, 64},
       .right = 0,
       .used_q = {0, 63, 129, 200},
       .used_k = {70, 200, 64, 1},
       .rules = {.bias = BiasSpec{.over = kOneMatrix}, .prefix_lens = {3, 100, 70, 1}}},
  };
  return cases;
}

inline std::vector<Case> term_cases() {
  constexpr Broadcast kOneMatrix = {.batch = true, .head = true};
  constexpr TermSpec kAll = {
      .softcap = 3, .alibi = Slopes::kOfAll, .sinks = true, .dropout_p = 0.15, .max_logit = true};
  return {
      {.name = "softcap, small",
       .shape = {2, 2, 1, 33, 70, kOfRow},
       .right = 0,
       .rules = {.terms = {.softcap = 1.5}},
       .small = true},
      {.name = "softcap",
       .shape = {2, 4, 2, 130, 200, kOfRow},
       .magnitude = 5,
       .dlse = true,
       .rules = {.terms = {.softcap = 5, .max_logit = true}},
       .repeats = 5},
      {.name = "softcap so large that it caps nothing",
       .shape = {1, 2, 1, 70, 90, kOfRow},
       .rules = {.terms = {.softcap = 1e6}}},
      {.name = "softcap so small that all scores are as large",
       .shape = {1, 2, 1, 70, 90, 64},
       .dlse = true,
       .rules = {.terms = {.softcap = 2e-38}}},
      {.name = "softcap, negative scale",
       .shape = {1, 2, 2, 70, 90, kOfRow},
       .scale = -0.2,
       .rules = {.terms = {.softcap = 2, .max_logit = true}}},
      {.name = "slopes, small",
       .shape = {2, 2, 1, 33, 70, kOfRow},
       .rules = {.terms = {.alibi = Slopes::kOfHeads}},
       .small = true},
      {.name = "slopes of all, causal",
       .shape = {2, 4, 2, 200, 300, kOfRow},
       .right = 0,
       .rules = {.terms = {.alibi = Slopes::kOfAll, .max_logit = true}},
       .repeats = 5},
      {.name = "slopes, more queries than keys",
       .shape = {2, 4, 1, 300, 130, 64},
       .dlse = true,
       .rules = {.terms = {.alibi = Slopes::kOfHeads}}},
      {.name = "sinks, small",
       .shape = {2, 3, 1, 33, 70, kOfRow},
       .right = 0,
       .rules = {.terms = {.sinks = true}},
       .small = true},
      {.name = "sinks, and rows that see nothing",
       .shape = {2, 3, 1, 300, 130, kOfRow},
       .right = 0,
       .dlse = true,
       .rules = {.terms = {.sinks = true, .max_logit = true}}},
      {.name = "dropout, small",
       .shape = {2, 2, 1, 33, 70, kOfRow},
       .right = 0,
       .rules = {.terms = {.dropout_p = 0.3}},
       .small = true},
      {.name = "dropout",
       .shape = {2, 4, 2, 130, 200, kOfRow},
       .dlse = true,
       .rules = {.terms = {.dropout_p = 0.2}},
       .repeats = 20},
      {.name = "dropout of all",
       .shape = {1, 2, 1, 70, 90, kOfRow},
       .dlse = true,
       .rules = {.terms = {.dropout_p = 1.0}}},
      {.name = "largest scores alone",
       .shape = {2, 4, 2, 130, 200, kOfRow},
       .left = 30,
       .right = 0,
       .rules = {.terms = {.max_logit = true}}},
      {.name = "largest scores of masked pairs",
       .shape = {1, 2, 1, 130, 200, 64},
       .rules = {.masks = {{.grain = 64, .keep = 0.2}}, .terms = {.max_logit = true}}},
      {.name = "softcap and slopes",
       .shape = {2, 4, 2, 130, 200, 128},
       .right = 0,
       .rules = {.terms = {.softcap = 2, .alibi = Slopes::kOfHeads}}},
      {.name = "softcap and dropout",
       .shape = {2, 4, 2, 130, 200, 128},
       .dlse = true,
       .rules = {.terms = {.softcap = 2, .dropout_p = 0.1}}},
      {.name = "softcap and a bias",
       .shape = {2, 4, 2, 130, 200, kOfRow},
       .dlse = true,
       .rules = {.bias = BiasSpec{kOneMatrix, Dtype::kBFloat16}, .terms = {.softcap = 2}}},
      {.name = "slopes and sinks",
       .shape = {2, 4, 2, 130, 200, 64},
       .left = 40,
       .right = 0,
       .rules = {.terms = {.alibi = Slopes::kOfAll, .sinks = true}}},
      {.name = "slopes and dropout",
       .shape = {2, 4, 2, 130, 200, 64},
       .dlse = true,
       .rules = {.terms = {.alibi = Slopes::kOfAll, .dropout_p = 0.2}}},
      {.name = "sinks and dropout",
       .shape = {2, 4, 2, 130, 200, 96},
       .right = 0,
       .rules = {.terms = {.sinks = true, .dropout_p = 0.2}}},
      {.name = "dropout and a bias",
       .shape = {2, 4, 2, 130, 200, 128},
       .right = 0,
       .rules = {.bias = BiasSpec{.over = {.batch = true}}, .terms = {.dropout_p = 0.2}}},
      {.name = "all terms, small",
       .shape = {2, 2, 1, 40, 70, kOfRow},
       .right = 0,
       .rules = {.terms = kAll},
       .small = true},
      {.name = "all terms",
       .shape = {2, 4, 2, 200, 300, kOfRow},
       .dlse = true,
       .rules = {.terms = kAll},
       .repeats = 20},
      {.name = "all terms, documents",
       .shape = {2, 4, 2, 400, 400, kOfRow},
       .right = 0,
       .rules = {.documents = 5, .terms = kAll}},
      {.name = "all terms, bias, mask and prefix",
       .shape = {2, 4, 2, 300, 300, kOfRow, 64},
       .left = 100,
       .right = 0,
       .dlse = true,
       .rules = {.bias = BiasSpec{.over = {.head = true}},
                 .masks = {{.over = kOneMatrix, .grain = 20}},
                 .prefix_lens = {90, 20},
                 .terms = kAll},
       .repeats = 5},
      {.name = "all terms, packed",
       .shape = {5, 4, 2, 200, 200, kOfRow},
       .right = 0,
       .gradient_slack = 2,  // the first queries see few keys
       .lengths_q = {64, 200, 0, 65, 1},
       .lengths_k = {200, 63, 1, 130, 0},
       .rules = {.terms = kAll},
       .repeats = 5},
      {.name = "all terms, packed, total lengths",
       .shape = {5, 4, 1, 200, 200, 128},
       .dlse = true,
       .lengths_q = {64, 200, 0, 65, 1},
       .lengths_k = {200, 63, 1, 130, 0},
       .rules = {.terms = kAll},
       .total_lengths = true},
      {.name = "all terms, used",
       .shape = {4, 4, 2, 200, 200, kOfRow},
       .right = 0,
       .dlse = true,
       .used_q = {0, 63, 129, 200},
       .used_k = {70, 200, 64, 1},
       .rules = {.terms = kAll}},
      {.name = "all terms, d72 v40",
       .shape = {1, 4, 2, 130, 200, 72, 40},
       .rules = {.terms = kAll}},
      {.name = "all terms, d192 v320",
       .shape = {1, 4, 2, 130, 200, 192, 320},
       .right = 0,
       .rules = {.terms = kAll}},
      {.name = "all terms, no keys",
       .shape = {2, 2, 1, 70, 0, 64},
       .dlse = true,
       .rules = {.terms = kAll},
       .every_row = true},
      {.name = "all terms, no queries", .shape = {1, 2, 2, 0, 70, 64}, .rules = {.terms = kAll}},
  };
}

// The same packed sequences where nobody says how long the longest is.
inline std::vector<Case> total_length_cases() {
  std::vector<Case> cases;
  for (const Case& test : variable_length_cases()) {
    if (!test.lengths_q.empty() || !test.lengths_k.empty()) {
      cases.push_back(test);
      cases.back().total_lengths = true;
    }
  }
  return cases;
}

inline std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const std::vector<Case>& some :
       {fixed_length_cases(), variable_length_cases(), total_length_cases(), head_dim_v_cases(),
        rule_cases(), rules_in_many_tiles(), term_cases()}) {
    cases.insert(cases.end(), some.begin(), some.end());
  }
  return cases;
}

}  // namespace fa::test
