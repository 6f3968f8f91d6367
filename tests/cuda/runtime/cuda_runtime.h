// The CUDA runtime of one thread for tests/cuda/test_runtime_errors.py: only what launches and
// queries need. Calls named in `failing` fail, and every error stays pending until it is fetched.
#pragma once

#include <cstddef>
#include <set>
#include <string>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDevice = 101,
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMultiProcessorCount,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
using cudaStream_t = struct Stream*;
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline std::set<std::string> failing;
inline cudaError_t pending = cudaSuccess;
inline int launched = 0;

inline cudaError_t answer(const char* name) {
  if (failing.count(name) == 0) return cudaSuccess;
  return pending = cudaErrorInvalidDevice;
}

inline cudaError_t cudaPeekAtLastError() { return pending; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t last = pending;
  pending = cudaSuccess;
  return last;
}
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorInvalidDevice ? "ours" : "another's";
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return answer("cudaRuntimeGetVersion");
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return answer("cudaDriverGetVersion");
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return answer("cudaGetDevice");
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (answer("cudaDeviceGetAttribute") != cudaSuccess) return cudaErrorInvalidDevice;
  *value = attribute <= cudaDevAttrComputeCapabilityMinor ? 9 : 227 * 1024;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return answer("cudaFuncSetAttribute");
}
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  const cudaError_t status = answer("cudaLaunchKernelExC");
  launched += status == cudaSuccess;
  return status;
}
