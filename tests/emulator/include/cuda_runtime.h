// As much of the CUDA runtime as csrc/cuda/common/device.cu asks: what a device and its driver are,
// which a test may set (tests/helpers/emulator.py).
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
