// Whether kernels of sm_90a run on the current device.
#pragma once

#include "cuda/common/launch.cuh"

namespace pmf::cuda {

// Of compute capability 9.0 and no other: sm_90a's code does not run on what came later.
inline bool device_is_hopper() {
  if (dry_run != nullptr) return dry_run->device().major == 9 && dry_run->device().minor == 0;
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

}  // namespace pmf::cuda
