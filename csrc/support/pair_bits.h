// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "common/params.h"

namespace fa::support {

// Which of the two are the rows of a tile's bits.
enum class BitRows { kQueries, kKeys };

// What the bits of a mask are made of.
struct PairBitsParams {
  KeepMask mask;
  PairBits bits;
  Shape shape;
  WindowMask window;  // bits of tiles that it hides are left out
  int tile_m;
  int tile_n;
  BitRows rows;
};

// What the windows of all sequences hide: without lengths and prefixes of their own that of the
// tensors, and else nothing. Params: of a pass.
template <typename Params>
WindowMask window_of_all(const Params& params) {
  const bool differ = params.queries.cu_seqlens != nullptr || params.queries.seqused != nullptr ||
                      params.keys.cu_seqlens != nullptr || params.keys.seqused != nullptr ||
                      params.rules.prefix_lens != nullptr;
  return differ ? WindowMask(params.shape.seqlen_q, params.shape.seqlen_k, -1, -1) : params.window;
}

// Tiles have 64 or 128 columns, and rows in whole warps.
void launch_pair_bits(const PairBitsParams& params, void* stream);

// Before the tile map and the kernel of a row that has tiles of this size; nothing where none are
// needed. Params: of a pass.
template <typename Params>
void fill_pair_bits(const Params& params, int tile_m, int tile_n, BitRows rows, void* stream) {
  if (params.pair_bits.words != nullptr) {
    launch_pair_bits({params.rules.masks[0], params.pair_bits, params.shape, window_of_all(params),
                      tile_m, tile_n, rows},
                     stream);
  }
}

}  // namespace fa::support
