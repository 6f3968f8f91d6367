// Sums as tensor cores make them.
//
// The products of a block of the depth, exact, and C are aligned to the largest exponent among
// them, cut kFraction bits below it, added exactly, and the sum is cut to fp32 (toward zero): Fasi,
// Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science
// 7 (2021); the numbers of bits and blocks, bit for bit as the hardware, in Xie, Wang, Yang and
// Yang, "MMA-Sim: bit-accurate reference model of tensor cores and matrix cores", arXiv:2511.10909
// (2025): Ampere 24 bits and two blocks of each instruction's depth, Hopper 25 and one.
#pragma once

namespace pmf::emulator {

constexpr int kColumns = 8, kMostDepth = 16;

// What a test may set (tests/helpers/emulator.py). 0 bits: fp32 sums in order, rounded to nearest.
struct TensorCores {
  int fraction_bits = 24, blocks = 2;
};
inline TensorCores tensor_cores;

// One row of A and all of B, and how large they are: floor(log2 |x|), of subnormal numbers the
// smallest that the type has normal ones of, and kNothing of 0.
constexpr int kNothing = -4096;

struct Row {
  double value[kMostDepth];
  int exponent[kMostDepth];
};
struct Columns {
  double value[kMostDepth][kColumns];
  alignas(32) int exponent[kMostDepth][kColumns];
};

// The exponent of a number that came from a type whose smallest normal one is 2^`least`.
int exponent_of(float x, int least);

// c += a B, over `depth` terms.
void add_products(float (&c)[kColumns], const Row& a, const Columns& b, int depth);

}  // namespace pmf::emulator
