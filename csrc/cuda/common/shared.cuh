// The block's shared memory. It is all dynamic: its size is an argument of launch().
#pragma once

#include "cuda/common/cuda.cuh"

namespace pmf::cuda {

// The first byte, aligned to 128.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

}  // namespace pmf::cuda
