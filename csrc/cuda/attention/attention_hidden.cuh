// Keeps inf and NaN in masked rows out of the result: where masked, 0 times NaN is 0.
//
// A masked score is -inf and its P exactly 0, but the tensor cores still multiply that 0 by the
// masked row. So kernels with masks scan every tile that may be partly masked for inf and NaN and
// multiply zeros in their place. Where they are not masked they still propagate: through the score,
// or by an explicit product here.
#pragma once

#include "cuda/attention/attention_tile.cuh"

namespace pmf::cuda {

// A mask of ones over each element (two of 16 bits, or one of 32) that is inf or NaN, else zeros.
template <typename T>
__device__ inline uint32_t not_finite(uint32_t x) {
  if constexpr (sizeof(T) == 4) {
    return (x & 0x7f800000u) == 0x7f800000u ? 0xffffffffu : 0u;
  } else {
    // Adding one to the all-ones exponent carries into the sign bit.
    constexpr bool kHalf = std::is_same_v<T, __half>;
    constexpr uint32_t kExponent = kHalf ? 0x7c007c00u : 0x7f807f80u;
    constexpr uint32_t kOne = kHalf ? 0x04000400u : 0x00800080u;
    return (((x & kExponent) + kOne) >> 15 & 0x00010001u) * 0xffffu;
  }
}

// The fragment with inf and NaN replaced by zeros.
template <typename T>
__device__ inline FragmentB finite(const FragmentB& b) {
  return {{b.x[0] & ~not_finite<T>(b.x[0]), b.x[1] & ~not_finite<T>(b.x[1])}};
}

// 1 where an element is inf or NaN, else 0.
template <class E>
__device__ inline FragmentB where_not_finite(const FragmentB& b) {
  using T = typename E::Storage;
  const FragmentB ones = E::ones(true);
  return {{ones.x[0] & not_finite<T>(b.x[0]), ones.x[1] & not_finite<T>(b.x[1])}};
}

// Whether any of the `elements` elements from `tiles` on is inf or NaN. All threads of the block
// call this after a barrier; `found` is in shared memory, one element per warp.
template <typename T>
__device__ inline bool any_not_finite(const T* tiles, int elements, uint32_t* found, int thread,
                                      int threads) {
  constexpr int kChunk = kChunkBytes / int(sizeof(T));
  uint32_t bad = 0;
  for (int i = thread; i < elements / kChunk; i += threads) {
    const uint4 w = *reinterpret_cast<const uint4*>(tiles + i * kChunk);
    bad |= not_finite<T>(w.x) | not_finite<T>(w.y) | not_finite<T>(w.z) | not_finite<T>(w.w);
  }
  const bool said = any_lane(bad != 0);
  if (thread % kWarpThreads == 0) found[thread / kWarpThreads] = said;
  __syncthreads();
  uint32_t any = 0;
  for (int warp = 0; warp < threads / kWarpThreads; ++warp) any |= found[warp];
  return any != 0;
}

}  // namespace pmf::cuda
