// The CUDA language and its 16-bit types. No other file includes the toolkit's headers, so that the
// tests can compile the same kernels for the CPU: tests/emulator/include has a file of this name.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace pmf::cuda {

constexpr int kWarpThreads = 32;
constexpr uint32_t kWholeWarp = 0xffffffffu;

// Promises that an address is a multiple of kBytes; the emulator checks it.
template <int kBytes, typename T>
__device__ inline T* assume_aligned(T* address) {
  return static_cast<T*>(__builtin_assume_aligned(address, kBytes));
}

}  // namespace pmf::cuda
