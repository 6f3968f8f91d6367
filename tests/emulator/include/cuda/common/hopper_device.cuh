// The emulator's csrc/cuda/common/hopper_device.cuh.
#pragma once

#include "cuda/common/launch.cuh"

namespace pmf::cuda {

inline bool device_is_hopper() { return emulator::limits().hopper; }

}  // namespace pmf::cuda
