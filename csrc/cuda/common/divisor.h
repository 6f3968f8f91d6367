// Division of block indices by values known on the host: a multiplication and a shift, because the
// hardware has no integer division instruction (Granlund and Montgomery, "Division by invariant
// integers using multiplication", 1994).
#pragma once

#include <cstdint>

namespace pmf::cuda {

struct Divisor {
  uint32_t value = 1, factor = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t divisor) : value(divisor) {
    uint32_t bits = 0;
    while ((uint64_t{1} << bits) < divisor) ++bits;
    if (bits == 0) return;
    factor = uint32_t(((uint64_t{1} << (31 + bits)) + divisor - 1) / divisor);
    shift = bits - 1;
  }

  // Replaces n, below 2^31, with the quotient and returns the remainder.
#ifdef __CUDACC__
  __device__
#endif
      uint32_t divide(uint32_t& n) const {
    const uint32_t quotient = value == 1 ? n : uint32_t(uint64_t{n} * factor >> 32) >> shift;
    const uint32_t remainder = n - quotient * value;
    n = quotient;
    return remainder;
  }
};

}  // namespace pmf::cuda
