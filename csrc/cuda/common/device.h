// The host interface of the CUDA kernels for code without the toolkit: no torch and no CUDA types.
// FAMILY_launchers.h declares each family's launch functions in terms of the contracts; a stream is
// an opaque pointer.
//
// A launch function returns null on success, otherwise one sentence that describes the error.
#pragma once

namespace pmf::cuda {

// Null if this library's kernels can run on the device, otherwise the reason: no driver, a driver
// older than the CUDA runtime, or a device older than sm_80. Queried once per device.
const char* device_problem(int device);

// The error of a launch whose plan needs shared-memory limits that the device does not report.
constexpr const char* kNoLimits = "the device does not say how much shared memory it has";

// Describes a CUDA runtime status (a cudaError_t); null for success.
const char* error_sentence(int status);

}  // namespace pmf::cuda
