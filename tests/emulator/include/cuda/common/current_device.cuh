// The emulator's csrc/cuda/common/current_device.cuh.
#pragma once

namespace pmf::cuda {

inline int current_device() { return 0; }

}  // namespace pmf::cuda
