// ldmatrix and mma.sync for a whole warp, by the fragment layouts of the PTX ISA ("Matrix
// multiply-accumulate operation using mma instruction", "ldmatrix"); lane = 4 g + t.
//
// Products are exact and sums fp32, added in order; the hardware's order and its rounding of sums
// are not documented.
#include <immintrin.h>

#include <cstring>

#include "emulator/numbers.h"
#include "memory.h"

namespace pmf::emulator {
namespace {

constexpr int kRows = 16, kColumns = 8, kMostDepth = 16, kMatrixRows = 8, kRowBytes = 16;

struct Factors {
  float a[kRows][kMostDepth];
  alignas(32) float b[kMostDepth][kColumns];
};

float low_half(Element element, uint32_t pair) {
  return element == Element::bf16 ? float(BFloat16::from_bits(pair & 0xffff))
                                  : float(Half::from_bits(pair & 0xffff));
}

void gather_16bit(Element element, const Warp& w, Factors& f) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const Lane& l = w.lanes[lane];
    for (int i = 0; i < 4; ++i) {
      float* pair = &f.a[g + i % 2 * 8][2 * t + i / 2 * 8];
      pair[0] = low_half(element, l.a[i]);
      pair[1] = low_half(element, l.a[i] >> 16);
    }
    for (int i = 0; i < 2; ++i) {
      const uint32_t pair = static_cast<uint32_t>(l.bits >> 32 * i);
      f.b[2 * t + i * 8][g] = low_half(element, pair);
      f.b[2 * t + i * 8 + 1][g] = low_half(element, pair >> 16);
    }
  }
}

void gather_tf32(const Warp& w, Factors& f) {
  const auto number = [](uint64_t bits) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) & 0xffffe000u);
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const Lane& l = w.lanes[lane];
    for (int i = 0; i < 4; ++i) f.a[g + i % 2 * 8][t + i / 2 * 4] = number(l.a[i]);
    for (int i = 0; i < 2; ++i) f.b[t + i * 4][g] = number(l.bits >> 32 * i);
  }
}

void multiply_warp(Element element) {
  const Warp& w = *machine.warp;
  Factors f;
  element == Element::tf32 ? gather_tf32(w, f) : gather_16bit(element, w, f);
  const int depth = element == Element::tf32 ? 8 : 16;
  for (int row = 0; row < kRows; ++row) {
    alignas(32) float c[kColumns];
    const int half = row / 8;
    Lane* lanes = &w.lanes[row % 8 * 4];
    for (int t = 0; t < 4; ++t)
      c[2 * t] = lanes[t].c[2 * half], c[2 * t + 1] = lanes[t].c[2 * half + 1];
    __m256 sum = _mm256_load_ps(c);
    for (int k = 0; k < depth; ++k) {
      sum = _mm256_fmadd_ps(_mm256_set1_ps(f.a[row][k]), _mm256_load_ps(f.b[k]), sum);
    }
    _mm256_store_ps(c, sum);
    for (int t = 0; t < 4; ++t)
      lanes[t].c[2 * half] = c[2 * t], lanes[t].c[2 * half + 1] = c[2 * t + 1];
  }
}

void load_warp(int count, bool transposed) {
  const Warp& w = *machine.warp;
  for (int matrix = 0; matrix < count; ++matrix) {
    uint16_t m[kMatrixRows][kMatrixRows];
    for (int row = 0; row < kMatrixRows; ++row) {
      const void* address = w.lanes[matrix * kMatrixRows + row].row;
      memory.access_by_warp(address, kRowBytes);
      std::memcpy(m[row], address, kRowBytes);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint16_t first = transposed ? m[2 * t][g] : m[g][2 * t];
      const uint16_t second = transposed ? m[2 * t + 1][g] : m[g][2 * t + 1];
      w.lanes[lane].matrices[matrix] = uint32_t{second} << 16 | first;
    }
  }
}

void whole_warp(const char* what) {
  if (machine.warp->count != kLanes) machine.fail(std::string(what) + " needs a warp of 32 lanes");
}

}  // namespace

Word4 load_matrices(const void* row, int count, bool transposed) {
  machine.place = __builtin_return_address(0);
  whole_warp("ldmatrix");
  Lane* self = machine.lane;
  const bool used = self->number % kLanes < count * kMatrixRows;
  if (used && reinterpret_cast<uintptr_t>(row) % kRowBytes != 0) {
    machine.fail("ldmatrix needs rows at multiples of 16");
  }
  self->row = row;
  machine.together(Together::load_matrices, count << 1 | transposed,
                   [=] { load_warp(count, transposed); });
  return self->matrices;
}

Float4 multiply(Element element, Float4 c, Word4 a, uint64_t b) {
  machine.place = __builtin_return_address(0);
  whole_warp("mma");
  Lane* self = machine.lane;
  self->c = c, self->a = a, self->bits = b;
  machine.together(Together::multiply, static_cast<int>(element), [=] { multiply_warp(element); });
  return self->c;
}

}  // namespace pmf::emulator
