// Host side of the CUDA kernels: launch functions, in the words of the contract headers. No torch
// and no CUDA types, so that csrc/ops needs no toolkit to compile; a stream is an opaque pointer.
//
// A launch function returns null, or one sentence about what went wrong.
#pragma once

#include "pmf/gated_residual.h"

namespace pmf::cuda {

// Null if kernels of this library can run on the device, else why not: no driver, a driver older
// than the runtime this was compiled with, or a device older than sm_80. Looked up once per device.
const char* device_problem(int device);

const char* gated_residual(const GatedResidualParams& params, void* stream);

// What a CUDA runtime status means; null for success. (int: cudaError_t.)
const char* error_sentence(int status);

}  // namespace pmf::cuda
