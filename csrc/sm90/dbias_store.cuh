// SPDX-License-Identifier: BSD-3-Clause
// Sums of ds leave for the gradient of a bias, by all math warps, of which each has 16 keys.
#pragma once

#include "common/dbias_tiles.h"
#include "device/convert.cuh"
#include "ptx/barrier.cuh"
#include "ptx/movmatrix.cuh"

namespace fa::sm90 {

// Of transposed scores, the queries in parts.
template <typename ScoresOfPart, int kPartsOfSums>
struct DbiasSums {
  using Scores = ScoresOfPart;
  static constexpr int kParts = kPartsOfSums;

  Scores parts[kParts];

  FA_DEVICE void clear() {
#pragma unroll
    for (Scores& r_part : parts) {
      r_part.clear();
    }
  }

  FA_DEVICE void add(int part, const Scores& r_ds) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (i == part) {
        parts[i].transform(
            [&](float sum, int, int block, int j) { return sum + r_ds.r[0][block][j]; });
      }
    }
  }
};

// Where the sums of a tile belong; none before the first.
struct DbiasPlace {
  int batch = -1;
  int head = 0;
  int first_query = 0;
  int first_key = 0;
};

FA_DEVICE float sum_of_rows(float value) {
#pragma unroll
  for (int distance = 4; distance < ptx::kWarpSize; distance *= 2) {
    value += __shfl_xor_sync(~0u, value, distance);
  }
  return value;
}

// Queries [0, rows) by keys [0, cols) from g_first on. A lane has two keys of each query: in an
// instruction of a warp eight lanes write consecutive floats.
template <typename Scores>
FA_DEVICE void store_floats(const Scores& r_sums, const ScoreTensor& dbias, float* g_first,
                            int rows, int cols) {
  float* g_lane = g_first + dbias.offset(Scores::col(0, 0), Scores::row(0));
#pragma unroll
  for (int block = 0; block < Scores::kColBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (Scores::col(block, i) < rows && Scores::row(i / 2) < cols) {
        g_lane[dbias.offset(i % 2, Scores::first_row(i / 2))] = r_sums.r[0][block][i];
      }
    }
    g_lane += dbias.offset(device::kBlockCols, 0);
  }
}

// The same as 16-bit elements, of which each lane receives four neighbours of one query.
template <typename Scores>
FA_DEVICE void store_halves(const Scores& r_sums, const ScoreTensor& dbias, bool is_float16,
                            uint16_t* g_first, int rows, int cols) {
  constexpr int kElements = 4;
  const int lane = ptx::lane_index();
  const bool is_odd = lane % 2 != 0;
  const int query = lane / 4;
  const int key = lane % 4 / 2 * kElements + lane % 2 * 2 * kElements;
  uint16_t* g_lane = g_first + dbias.offset(query, key);
  const bool is_whole = cols >= device::kBlockRows && dbias.key_stride == 1 &&
                        dbias.query_stride % kElements == 0 &&
                        reinterpret_cast<uintptr_t>(g_first) % sizeof(uint2) == 0;
#pragma unroll
  for (int block = 0; block < Scores::kColBlocks; ++block) {
    uint32_t r_pairs[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* r_sum = &r_sums.r[0][block][2 * half];
      r_pairs[half] =
          ptx::transpose_8x8(is_float16 ? ptx::convert_pair<__half>(r_sum[0], r_sum[1])
                                        : ptx::convert_pair<__nv_bfloat16>(r_sum[0], r_sum[1]));
    }
    // Of neighbours the even lane gets the first keys of both, the odd one the others.
    const uint32_t received = __shfl_xor_sync(~0u, is_odd ? r_pairs[0] : r_pairs[1], 1);
    const uint2 keys = is_odd ? uint2{received, r_pairs[1]} : uint2{r_pairs[0], received};
    if (block * device::kBlockCols + query < rows) {
      if (is_whole) {
        *reinterpret_cast<uint2*>(g_lane) = keys;
      } else {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          if (key + i < cols) {
            g_lane[dbias.offset(0, i)] =
                static_cast<uint16_t>((i < 2 ? keys.x : keys.y) >> i % 2 * 16);
          }
        }
      }
    }
    g_lane += dbias.offset(device::kBlockCols, 0);
  }
}

// One element.
FA_DEVICE void store_sum(const ScoreTensor& dbias, Dtype dtype, const DbiasPlace& at, float sum) {
  const int64_t offset = dbias.offset(at.first_query, at.first_key);
  if (dtype == Dtype::kFloat32) {
    dbias.of_head<float>(at.batch, at.head)[offset] = sum;
  } else if (dtype == Dtype::kFloat16) {
    dbias.of_head<__half>(at.batch, at.head)[offset] = device::from_float<__half>(sum);
  } else {
    dbias.of_head<__nv_bfloat16>(at.batch, at.head)[offset] =
        device::from_float<__nv_bfloat16>(sum);
  }
}

// Where the bias is broadcast along the keys: s_sums has kFloatsOfWarp floats for each warp, for
// its sum of each query, `queries` of them, or of all queries.
template <int kWarps, int kFloatsOfWarp>
FA_DEVICE void store_sums_of_warps(const ScoreTensor& dbias, Dtype dtype, const DbiasPlace& at,
                                   const float* s_sums, int queries, int thread, int barrier) {
  constexpr int kThreads = kWarps * ptx::kWarpSize;
  ptx::barrier_sync<kThreads>(barrier);
  for (int query = thread; query < queries; query += kThreads) {
    float sum = 0.0f;
#pragma unroll 1
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += s_sums[warp * kFloatsOfWarp + query];
    }
    store_sum(dbias, dtype, {at.batch, at.head, at.first_query + query, 0}, sum);
  }
  ptx::barrier_sync<kThreads>(barrier);  // before anyone writes there again
}

// All of it, for the warp whose keys begin at warp_key of the tile. s_floats: as above, a part of
// them for each warp, all its own where the bias is broadcast along the keys.
template <typename Traits, typename Sums>
FA_DEVICE void store_dbias(const BwdParams& params, const Sums& r_sums, DbiasPlace at, int warp_key,
                           float* s_floats, int barrier) {
  using Scores = typename Sums::Scores;
  constexpr int kFloatsOfWarp = device::kBlockRows * Scores::kCols;
  const ScoreTensor& dbias = params.dbias;
  const Dtype dtype = params.rules.bias_dtype;
  const int rows = params.shape.seqlen_q - at.first_query;
  const int cols = params.shape.seqlen_k - at.first_key - warp_key;
  const int thread = static_cast<int>(threadIdx.x) % Traits::kMathThreads;
  const auto sums_of_warps = [&](int queries) {
    store_sums_of_warps<Traits::kMathWarps, kFloatsOfWarp>(dbias, dtype, at, s_floats, queries,
                                                           thread, barrier);
  };
  float* s_own = s_floats + warp_key * Scores::kCols;

  if (dbias.query_stride == 0) {
    typename Scores::RowValues of_keys = {};
#pragma unroll
    for (const Scores& r_part : r_sums.parts) {
      r_part.for_each([&](float sum, int key) { of_keys[key] += sum; });
    }
#pragma unroll
    for (float& of_key : of_keys) {
      of_key = device::row_sum(of_key);
    }
    if (dbias.key_stride == 0) {
      const float sum = sum_of_rows(of_keys[0] + of_keys[1]);
      if (ptx::lane_index() == 0) {
        s_own[0] = sum;
      }
      sums_of_warps(1);
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = Scores::row(half);
      if (device::leads_row() && key < cols) {
        store_sum(dbias, dtype, {at.batch, at.head, 0, at.first_key + warp_key + key},
                  of_keys[half]);
      }
    }
    return;
  }

  if (dbias.key_stride == 0) {
#pragma unroll
    for (int part = 0; part < Sums::kParts; ++part) {
#pragma unroll
      for (int block = 0; block < Scores::kColBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float (&r_block)[4] = r_sums.parts[part].r[0][block];
          const float sum = sum_of_rows(r_block[i] + r_block[2 + i]);
          if (ptx::lane_index() < 4) {
            s_own[part * Scores::kCols + Scores::col(block, i)] = sum;
          }
        }
      }
    }
    sums_of_warps(min(rows, Sums::kParts * Scores::kCols));
    return;
  }

#pragma unroll
  for (int part = 0; part < Sums::kParts; ++part) {
    const int first_query = part * Scores::kCols;
    const int64_t offset = dbias.offset(at.first_query + first_query, at.first_key + warp_key);
    if (dtype == Dtype::kFloat32) {
      store_floats(r_sums.parts[part], dbias, dbias.of_head<float>(at.batch, at.head) + offset,
                   rows - first_query, cols);
    } else {
      store_halves(r_sums.parts[part], dbias, dtype == Dtype::kFloat16,
                   dbias.of_head<uint16_t>(at.batch, at.head) + offset, rows - first_query, cols);
    }
  }
}

}  // namespace fa::sm90
