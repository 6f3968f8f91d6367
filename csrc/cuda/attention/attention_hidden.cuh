// What a mask hides does not matter, whatever it holds: 0 times NaN is 0 there.
//
// A hidden score is -inf and its P exactly 0, but tensor cores multiply that 0 with the row that it
// hides. So kernels that may hide something look into every tile that they may hide a part of, and
// where an element is not finite, they multiply zeros in its place. What is not finite and not
// hidden still comes through: by way of its score, or as an explicit product here.
#pragma once

#include "cuda/attention/attention_tile.cuh"

namespace pmf::cuda {

// All ones in place of each element (two of 16 bits, or one of 32) that is inf or NaN, else zeros.
template <typename T>
__device__ inline uint32_t not_finite(uint32_t x) {
  if constexpr (sizeof(T) == 4) {
    return (x & 0x7f800000u) == 0x7f800000u ? 0xffffffffu : 0u;
  } else {
    // One more than the largest exponent carries into the sign's bit.
    constexpr bool kHalf = std::is_same_v<T, __half>;
    constexpr uint32_t kExponent = kHalf ? 0x7c007c00u : 0x7f807f80u;
    constexpr uint32_t kOne = kHalf ? 0x04000400u : 0x00800080u;
    return (((x & kExponent) + kOne) >> 15 & 0x00010001u) * 0xffffu;
  }
}

// The fragment with zeros for what is not finite.
template <typename T>
__device__ inline FragmentB finite(const FragmentB& b) {
  return {{b.x[0] & ~not_finite<T>(b.x[0]), b.x[1] & ~not_finite<T>(b.x[1])}};
}

// Ones where an element is not finite.
template <class E>
__device__ inline FragmentB where_not_finite(const FragmentB& b) {
  using T = typename E::Storage;
  const FragmentB ones = E::ones(true);
  return {{ones.x[0] & not_finite<T>(b.x[0]), ones.x[1] & not_finite<T>(b.x[1])}};
}

// Whether anything in `tiles` tiles that follow one another is not finite. Every thread of the
// block calls it, behind a barrier; `found` is shared, one element a warp.
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
