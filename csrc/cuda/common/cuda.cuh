// The CUDA language and its 16-bit types. Only this file includes the toolkit's headers: tests
// replace it with tests/emulator/include/cuda/common/cuda.cuh to compile the kernels for the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace pmf::cuda {

constexpr int kWarpThreads = 32;
constexpr uint32_t kWholeWarp = 0xffffffffu;

// Asserts to the compiler that an address is a multiple of kBytes; the emulator checks it.
template <int kBytes, typename T>
__device__ inline T* assume_aligned(T* address) {
  return static_cast<T*>(__builtin_assume_aligned(address, kBytes));
}

}  // namespace pmf::cuda
