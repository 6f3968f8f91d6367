// Emulates the sums of tensor cores.
//
// The exact products of a block of the depth, and C, are aligned to the largest exponent, truncated
// `fraction_bits` below it and added exactly; the sum is truncated to fp32: Fasi, Higham, Mikaitis
// and Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7 (2021). The
// numbers of bits and blocks, bit for bit as in hardware, are from Xie, Wang, Yang and Yang,
// "MMA-Sim: bit-accurate reference model of tensor cores and matrix cores", arXiv:2511.10909
// (2025): 24 bits and two blocks per instruction on Ampere, 25 and one on Hopper.
#pragma once

namespace pmf::emulator {

constexpr int kColumns = 8, kMostDepth = 16;

// Settable by tests (tests/helpers/emulator.py). 0 bits: fp32 sums in order, rounded to nearest.
struct TensorCores {
  int fraction_bits = 24, blocks = 2;
};
inline TensorCores tensor_cores;

// One row of A and all of B, with exponents floor(log2 |x|); subnormal numbers have that of the
// type's smallest normal number, and 0 has kNothing.
constexpr int kNothing = -4096;

struct Row {
  double value[kMostDepth];
  int exponent[kMostDepth];
};
struct Columns {
  double value[kMostDepth][kColumns];
  alignas(32) int exponent[kMostDepth][kColumns];
};

// The exponent of a number from a type whose smallest normal number is 2^`least`.
int exponent_of(float x, int least);

// c += a B, over `depth` terms.
void add_products(float (&c)[kColumns], const Row& a, const Columns& b, int depth);

}  // namespace pmf::emulator
