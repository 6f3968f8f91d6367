// How Hopper's copies and products (hopper.cuh) describe shared memory and tensors: plain numbers,
// the same on a device and in the tests' emulator.
//
// PTX ISA, 9.7.15.5.1.2 "Shared Memory Matrix Layout". Matrices of 16-bit elements are stored as
// column panels as wide as the swizzle (128, 64 or 32 bytes), each row by row. The position of
// 16-byte chunk c of a row holds chunk c ^ s: bits 4 to 6 (4 and 5, 4) of its address, exclusive-or
// bits 7 to 9 (7 and 8, 7). Tensor maps write this layout and descriptors read it; a tile at a
// multiple of 1024 bytes (512, 256) starts with s = 0.
#pragma once

#include "cuda/common/cuda.cuh"

namespace pmf::cuda {

// Encoded as in a descriptor, and as in the emulator's tensor maps.
enum class Swizzle : uint32_t { bytes128 = 1, bytes64 = 2, bytes32 = 3 };

constexpr int swizzle_bytes(Swizzle swizzle) { return 256 >> static_cast<uint32_t>(swizzle); }
// The byte period of a swizzle pattern, which a tile's address must be a multiple of.
constexpr int swizzle_repeat(Swizzle swizzle) { return 8 * swizzle_bytes(swizzle); }

// A matrix in shared memory at `address` (below 2^18), a multiple of 16. If K runs along rows,
// `stride` is the bytes between groups of eight rows and `leading` is unused; a step of k = 16 adds
// 32 to the address. If K runs across rows (the transposed B), `leading` is the bytes between
// panels and `stride` those between groups of eight rows.
//
// A sum of independent terms, so a tile's descriptors are one base plus compile-time constants.
__device__ constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride,
                                                Swizzle swizzle) {
  const uint32_t low = (address >> 4) + (leading >> 4 << 16);
  const uint32_t high = (stride >> 4) | static_cast<uint32_t>(swizzle) << 30;
  return uint64_t{high} << 32 | low;
}

// A CUtensorMap, opaque here: a tensor's place in global memory and the box that a copy transfers.
struct alignas(128) TensorMap {
  uint64_t words[16];
};

}  // namespace pmf::cuda
