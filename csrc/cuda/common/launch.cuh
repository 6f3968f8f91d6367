// Kernel launches and queries of the current device's limits.
#pragma once

#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#include "cuda/common/dry_run.h"
#include "cuda/common/errors.h"

namespace pmf::cuda {

// Kernels with more shared memory per block than this prefer shared memory over L1: otherwise fewer
// blocks would fit an SM, and above 48 KB none.
constexpr int64_t kSharedBesideCache = 8 * 1024;

constexpr size_t kMostParameterBytes = 32764;  // of a kernel, from CUDA 12.1 on

// 0 if the device does not report it; plans that need the value refuse to run.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  const auto ask = [&] {
    const cudaError_t status = cudaGetDevice(&device);
    return status != cudaSuccess ? status : cudaDeviceGetAttribute(&value, attribute, device);
  };
  return checked(ask) == cudaSuccess ? value : 0;
}

// Allows a kernel's blocks the device's maximum of shared memory: once per kernel and device, and
// never less, because another thread's launch may be in progress.
inline cudaError_t allow_shared(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) != 0) return cudaSuccess;
  int most = 0;
  status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared);
  }
  if (status == cudaSuccess) allowed.insert({kernel, device});
  return status;
}

// Returns the status of this launch alone; <<<>>> would also report errors pending from before.
template <class... Parameters>
cudaError_t launch_with(const void* kernel, unsigned cluster, dim3 grid, dim3 block,
                        int64_t shared_bytes, cudaStream_t stream,
                        const Parameters&... parameters) {
  const void* addresses[] = {&parameters...};
  return checked([&] {
    const cudaError_t status =
        shared_bytes > kSharedBesideCache ? allow_shared(kernel) : cudaSuccess;
    if (status != cudaSuccess) return status;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1;
    return cudaLaunchKernelExC(&config, kernel, const_cast<void**>(addresses));
  });
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...) in clusters of `cluster` blocks,
// adjacent in x; a dry run only records it.
template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), unsigned cluster, dim3 grid, dim3 block,
                            int64_t shared_bytes, cudaStream_t stream,
                            const Arguments&... arguments) {
  static_assert((0 + ... + sizeof(Parameters)) <= kMostParameterBytes,
                "more than a launch can pass");
  if (dry_run != nullptr) {
    dry_run->launch(reinterpret_cast<const void*>(kernel), int64_t(grid.x) * grid.y * grid.z,
                    int64_t(block.x) * block.y * block.z, shared_bytes);
    return cudaSuccess;
  }
  return launch_with<std::decay_t<Parameters>...>(reinterpret_cast<const void*>(kernel), cluster,
                                                  grid, block, shared_bytes, stream, arguments...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  return launch_clusters(kernel, 1, grid, block, shared_bytes, stream, arguments...);
}

// Most shared memory a block may request, in bytes: 99 KB on sm_86, 163 on sm_80, 227 on sm_90.
inline int64_t device_shared_limit() {
  if (dry_run != nullptr) return dry_run->device().shared_per_block;
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Shared memory per SM, in bytes; each resident block takes 1 KB more than it requests.
inline int64_t device_shared_per_processor() {
  if (dry_run != nullptr) return dry_run->device().shared_per_processor;
  return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
}

inline int device_processors() {
  if (dry_run != nullptr) return dry_run->device().processors;
  return device_attribute(cudaDevAttrMultiProcessorCount);
}

}  // namespace pmf::cuda
