// What Hopper's copies and products (hopper.cuh) are told about shared memory and tensors: plain
// numbers, the same for a device and for the tests' emulator.
//
// PTX ISA, 9.7.15.5.1.2 "Shared Memory Matrix Layout". Matrices of 16-bit elements lie in pieces as
// wide as the swizzle, 128, 64 or 32 bytes; of each piece, row after row. Where chunk c (16 bytes)
// of a row would be is found chunk c ^ s: bits 4 to 6 (4 and 5, 4) of its address, exclusive-or
// bits 7 to 9 (7 and 8, 7). Tensor maps write so, descriptors read so; a tile that begins at a
// multiple of 1024 bytes (512, 256) begins with s = 0.
#pragma once

#include "cuda/common/cuda.cuh"

namespace pmf::cuda {

// As a descriptor encodes them; the emulator's tensor maps do, too.
enum class Swizzle : uint32_t { bytes128 = 1, bytes64 = 2, bytes32 = 3 };

constexpr int swizzle_bytes(Swizzle swizzle) { return 256 >> static_cast<uint32_t>(swizzle); }
// After so many rows a tile's swizzle begins anew: what its address must be a multiple of.
constexpr int swizzle_repeat(Swizzle swizzle) { return 8 * swizzle_bytes(swizzle); }

// A matrix in shared memory at `address` (below 2^18), a multiple of 16. K runs along rows:
// `stride` bytes from eight rows to the next eight, and `leading` is not used; a step of k = 16 is
// an address 32 further on. K runs across rows (the transposed B): `leading` bytes from a piece to
// the next, `stride` from eight rows to the next eight.
//
// Sums of constants, so that the descriptors of a tile are one base plus what the compiler knows.
__device__ constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride,
                                                Swizzle swizzle) {
  const uint32_t low = (address >> 4) + (leading >> 4 << 16);
  const uint32_t high = (stride >> 4) | static_cast<uint32_t>(swizzle) << 30;
  return uint64_t{high} << 32 | low;
}

// A CUtensorMap: where a tensor is in global memory, and the box that a copy takes of it. Opaque.
struct alignas(128) TensorMap {
  uint64_t words[16];
};

}  // namespace pmf::cuda
