// The subset of the CUDA runtime that csrc/cuda/common/device.cu uses to query a device and its
// driver, whose properties tests can set (tests/helpers/emulator.py).
#pragma once

#include "emulator/device.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };

inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = pmf::emulator::kRuntimeVersion;
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = pmf::emulator::driver_version;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device >= pmf::emulator::kDevices) return cudaErrorInvalidDevice;
  const pmf::emulator::Capability& found = pmf::emulator::capabilities[device];
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? found.major : found.minor;
  return cudaSuccess;
}

inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorInvalidDevice ? "invalid device ordinal"
                                          : pmf::emulator::last_problem();
}
