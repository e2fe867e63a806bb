// SPDX-License-Identifier: BSD-3-Clause
// From a problem on a device to the chosen kernel, running on that device's current stream or on
// torch's CPU threads.
#pragma once

#include <initializer_list>

#include "api/tensors.h"
#include "dispatch/select.h"

namespace fa::api {

// The CUDA device's properties; throws fa::Error in a build without CUDA, saying how to get one
// with it.
CudaDevice cuda_device(int device_index);

// For tests: from here on cuda_device() tells of no more shared memory than this many bytes, so
// that the kernels for smaller devices are chosen. 0: as much as there is.
void limit_shared_memory(int64_t bytes);

// allow_tf32: of float32 on CUDA.
Problem problem_for(Pass pass, const Argument& q, const Shape& shape, const WindowMask& window,
                    const ScoreRules& rules, bool allow_tf32);

// common/clean_sequences.h on the device of q.
void clean_on_cuda(const GivenSequences& queries, const GivenSequences& keys, const Argument& q);

// common/left_rows.h on the device of q.
void fill_on_cuda(std::initializer_list<LeftRows> results, const Argument& q);
// On the device of the argument that the mask's state comes from.
void fill_dropout_mask(const DropoutMask& mask, const Argument& rng_state);

void launch(const FwdParams& params, const Argument& q, int row);
void launch(const BwdParams& params, const Argument& q, int row);

}  // namespace fa::api
