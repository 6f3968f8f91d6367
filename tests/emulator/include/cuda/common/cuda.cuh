// The emulator's csrc/cuda/common/cuda.cuh: the subset of CUDA that the kernels use, for a host
// compiler. As in CUDA, these names are in the global namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "emulator/numbers.h"
#include "emulator/runtime.h"

#define __global__
#define __device__
#define __grid_constant__
#define __restrict__ __restrict
#define __launch_bounds__(...)

#define threadIdx (::pmf::emulator::thread_index())
#define blockIdx (::pmf::emulator::block_index())
#define blockDim (::pmf::emulator::block_size())
#define gridDim (::pmf::emulator::grid_size())

// ---- vectors ------------------------------------------------------------------------------------

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- functions on 16-bit types ------------------------------------------------------------------

using __nv_bfloat16 = pmf::emulator::BFloat16;
using __half = pmf::emulator::Half;
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline float __half2float(__half x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __half __float2half_rn(float x) { return __half(x); }

// ---- arithmetic ---------------------------------------------------------------------------------

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float __uint_as_float(uint32_t x) { return __builtin_bit_cast(float, x); }

// ---- memory and barriers ------------------------------------------------------------------------

template <typename T>
inline void __stwb(T* address, std::common_type_t<T> value) {
  *address = value;
}
inline void __syncthreads() { pmf::emulator::sync_threads(0, 0); }
inline void __syncwarp() { pmf::emulator::sync_warp(); }

// ---- the runtime's host functions ---------------------------------------------------------------

using cudaStream_t = struct EmulatedStream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return pmf::emulator::last_problem(); }

namespace pmf::cuda {

constexpr int kWarpThreads = 32;
constexpr uint32_t kWholeWarp = 0xffffffffu;

template <int kBytes, typename T>
inline T* assume_aligned(T* address) {
  emulator::check_aligned(address, kBytes);
  return address;
}

}  // namespace pmf::cuda
