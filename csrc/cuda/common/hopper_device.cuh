// Whether kernels of sm_90a run on the current device.
#pragma once

#include "cuda/common/launch.cuh"

namespace pmf::cuda {

// Compute capability 9.0 only: code for sm_90a does not run on later architectures.
inline bool device_is_hopper() {
  if (dry_run != nullptr) return dry_run->device().major == 9 && dry_run->device().minor == 0;
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

}  // namespace pmf::cuda
