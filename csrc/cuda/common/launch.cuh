// Starting kernels, and what the current device offers them.
#pragma once

#include "cuda/common/cuda.cuh"
#include "cuda/common/dry_run.h"

namespace pmf::cuda {

constexpr int kSharedWithoutAsking =
    48 * 1024;  // more than this must be asked for, kernel by kernel

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), or a note of it in a dry run.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (dry_run != nullptr) {
    dry_run->launch(reinterpret_cast<const void*>(kernel), int64_t(grid.x) * grid.y * grid.z,
                    int64_t(block.x) * block.y * block.z, shared_bytes);
    return cudaSuccess;
  }
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, block, static_cast<size_t>(shared_bytes), stream>>>(arguments...);
  return cudaGetLastError();
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

// Bytes of shared memory that one block may ask for: 99 KB on sm_86, 163 on sm_80, 227 on sm_90.
inline int64_t device_shared_limit() {
  if (dry_run != nullptr) return dry_run->device().shared_per_block;
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Bytes that the blocks on one multiprocessor share; each block takes 1 KB more than it asks for.
inline int64_t device_shared_per_processor() {
  if (dry_run != nullptr) return dry_run->device().shared_per_processor;
  return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
}

inline int device_processors() {
  if (dry_run != nullptr) return dry_run->device().processors;
  return device_attribute(cudaDevAttrMultiProcessorCount);
}

}  // namespace pmf::cuda
