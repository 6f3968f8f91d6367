// Kernels with faults that tests/cuda must find in machine code, and one without.
#include "cuda/common/ptx.cuh"
#include "cuda/common/shared.cuh"
#include "cuda/common/vector.cuh"

namespace pmf::cuda {

// An array whose index the compiler does not know lives on the stack.
__global__ void stack_frame(float* x, const int* index) {
  float values[16] = {};
  for (int i = 0; i < 64; ++i) values[index[i] & 15] += x[i];
  for (int i = 0; i < 64; ++i) x[i] = values[index[threadIdx.x + i] & 15];
}

// 96 live values do not fit in 64 registers.
__global__ void __launch_bounds__(1024, 1) spills(float* x) {
  float values[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) values[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) x[(95 - i) * 1024 + threadIdx.x] = values[i];
}

// Static shared memory, which launches do not request.
__global__ void __launch_bounds__(256) static_shared(float* x) {
  __shared__ float buffer[10240];
  buffer[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = buffer[255 - threadIdx.x];
}

// Accesses of 4 bytes.
__global__ void narrow(const float* x, float* y) { y[threadIdx.x] = 2 * x[threadIdx.x]; }

// A kernel without faults.
__global__ void sound(const __nv_bfloat16* x, float* y) {
  unsigned char* const shared = dynamic_shared();
  cp_async_16(shared + 16 * threadIdx.x, x + 8 * threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  float c[4] = {};
  uint32_t a[4], b[2];
  ldmatrix_x4(a, shared + 16 * threadIdx.x);
  ldmatrix_x2(b, shared + 16 * threadIdx.x);
  mma_m16n8k16<__nv_bfloat16>(c, a, b);
  store_vector(y + 4 * threadIdx.x, c);
}

}  // namespace pmf::cuda
