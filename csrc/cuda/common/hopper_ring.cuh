// Shared by the Hopper kernels: the ring of slots between the warps that copy and the warpgroups
// that multiply.
#pragma once

#include "cuda/common/hopper.cuh"

namespace pmf::cuda {

constexpr int kGroupThreads = 128, kGroupWarps = kGroupThreads / kWarpThreads;  // a warpgroup

// A slot of the ring, and the parity of the phase that ends when it has been filled.
template <int kSlots>
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;

  __device__ RingPlace next() const {
    return slot + 1 == kSlots ? RingPlace{0, parity ^ 1} : RingPlace{slot + 1, parity};
  }
  // The place `count` slots earlier; count <= kSlots.
  __device__ RingPlace before(int count) const {
    return slot < count ? RingPlace{slot + kSlots - count, parity ^ 1}
                        : RingPlace{slot - count, parity};
  }
};

// What a matrix descriptor grows by when its matrix lies `bytes` further on.
__device__ constexpr uint64_t further(uint32_t bytes) { return bytes >> 4; }

}  // namespace pmf::cuda
