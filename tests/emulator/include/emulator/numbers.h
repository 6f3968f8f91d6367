// bfloat16 and float16: storage, and conversion with rounding to nearest even.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pmf::emulator {

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(float x) {
    const uint32_t word = __builtin_bit_cast(uint32_t, x);
    const uint32_t rounded = word + 0x7fffu + (word >> 16 & 1u);
    bits = x != x ? 0x7fffu : rounded >> 16;
  }
  static BFloat16 from_bits(uint32_t bits) {
    BFloat16 result;
    result.bits = static_cast<uint16_t>(bits);
    return result;
  }
  operator float() const { return __builtin_bit_cast(float, uint32_t{bits} << 16); }
};

struct Half {
  uint16_t bits;

  Half() = default;
  explicit Half(float x) : bits(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)) {}
  static Half from_bits(uint32_t bits) {
    Half result;
    result.bits = static_cast<uint16_t>(bits);
    return result;
  }
  operator float() const { return _cvtsh_ss(bits); }
};

}  // namespace pmf::emulator
