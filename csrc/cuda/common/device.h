// Host side of the CUDA kernels, for those that need no toolkit: no torch and no CUDA types. Each
// family's launch functions are in its FAMILY_launchers.h, in the words of the contracts; a stream
// is an opaque pointer.
//
// A launch function returns null, or one sentence about what went wrong.
#pragma once

namespace pmf::cuda {

// Null if kernels of this library can run on the device, else why not: no driver, a driver older
// than the runtime this was compiled with, or a device older than sm_80. Looked up once per device.
const char* device_problem(int device);

// Of a launch whose plan needs what the device does not answer.
constexpr const char* kNoLimits = "the device does not say how much shared memory it has";

// What a CUDA runtime status means; null for success. (int: cudaError_t.)
const char* error_sentence(int status);

}  // namespace pmf::cuda
