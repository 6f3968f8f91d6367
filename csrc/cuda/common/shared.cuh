// The block's shared memory, all of it dynamic: launch() takes its size.
#pragma once

#include "cuda/common/cuda.cuh"

namespace pmf::cuda {

// The first byte, 128-byte aligned.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

}  // namespace pmf::cuda
