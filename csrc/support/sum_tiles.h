// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "common/params.h"

namespace fa::support {

// The second step of a gradient of slopes or sinks: the partial sums of its tiles become one for
// each head, or for each head of each batch entry. Tiles have tile_rows rows of the sequences, of
// which none is longer than seqlen, and are numbered as by Sequences::first_tile(); those that no
// sequence has must be 0.
void launch_sum_tiles(const HeadGradient& gradient, const Sequences& sequences, const Shape& shape,
                      int seqlen, int tile_rows, void* stream);

}  // namespace fa::support
