// The device that a launch targets.
#pragma once

#include "cuda/common/dry_run.h"
#include "cuda/common/errors.h"

namespace pmf::cuda {

// The current device's number; -1 in a dry run.
inline int current_device() {
  int device = -1;
  if (dry_run == nullptr) checked([&] { return cudaGetDevice(&device); });
  return device;
}

}  // namespace pmf::cuda
