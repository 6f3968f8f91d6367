// Whether kernels of sm_90a run on the current device.
#pragma once

#include "cuda/common/launch.cuh"

namespace pmf::cuda {

// What a block of them may ask for, and of no older device.
constexpr int64_t kHopperShared = 227 * 1024;

// A dry run's device is an sm_90 if its blocks may have as much shared memory.
inline bool device_is_hopper() {
  if (dry_run != nullptr) return dry_run->device().shared_per_block >= kHopperShared;
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

}  // namespace pmf::cuda
