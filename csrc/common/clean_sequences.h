// SPDX-License-Identifier: BSD-3-Clause
// Lengths and first rows that kernels may trust, made of what a caller gave: whatever that was, no
// sequence leaves its tensor, none begins before the one before it ends, and none is longer than
// said.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "common/types.h"

namespace fa {

struct GivenSequences {
  const int32_t* cu_seqlens;  // (batch + 1), or null: each has a batch entry of `rows` rows
  const int32_t* seqused;     // (batch), or null: all rows
  int batch;
  int rows;                   // of the packed tensor, or of each batch entry
  int longest;                // rows of a sequence past this many do not count
  int32_t* clean_cu_seqlens;  // (batch + 1); null where cu_seqlens is
  int32_t* clean_seqused;     // (batch)

  FA_HOST_DEVICE constexpr int32_t clean_first_row(int index) const {
    return min(max(cu_seqlens[index], 0), rows);
  }
  // length: of the sequence by its clean first rows.
  FA_HOST_DEVICE constexpr int32_t clean_length(int batch_index, int32_t length) const {
    const int32_t most = min(length, longest);
    return seqused == nullptr ? most : min(max(seqused[batch_index], 0), most);
  }
};

// On the host.
inline void clean_sequences(const GivenSequences& given) {
  int32_t begin = 0;
  if (given.cu_seqlens != nullptr) {
    begin = given.clean_cu_seqlens[0] = given.clean_first_row(0);
  }
  for (int index = 0; index < given.batch; ++index) {
    int32_t length = given.rows;
    if (given.cu_seqlens != nullptr) {
      const int32_t end = max(begin, given.clean_first_row(index + 1));
      given.clean_cu_seqlens[index + 1] = end;
      length = end - begin;
      begin = end;
    }
    given.clean_seqused[index] = given.clean_length(index, length);
  }
}

}  // namespace fa
