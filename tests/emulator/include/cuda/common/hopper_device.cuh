// The emulator's csrc/cuda/common/hopper_device.cuh.
#pragma once

#include "cuda/common/launch.cuh"

namespace pmf::cuda {

constexpr int64_t kHopperShared = 227 * 1024;

inline bool device_is_hopper() { return device_shared_limit() >= kHopperShared; }

}  // namespace pmf::cuda
