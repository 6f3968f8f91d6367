// The emulator's csrc/cuda/common/shared.cuh.
#pragma once

#include "cuda/common/cuda.cuh"

namespace pmf::cuda {

inline unsigned char* dynamic_shared() { return emulator::shared_memory(); }

}  // namespace pmf::cuda
