// ldmatrix and mma.sync for a whole warp, with the fragment layouts of the PTX ISA ("Matrix
// multiply-accumulate operation using mma instruction", "ldmatrix"); lane = 4 g + t.
#include <cstring>

#include "emulator/numbers.h"
#include "memory.h"
#include "sums.h"

namespace pmf::emulator {
namespace {

constexpr int kRows = 16, kMatrixRows = 8, kRowBytes = 16;

struct Factors {
  Row a[kRows];
  Columns b;

  void put_a(int row, int k, float x, int least) {
    a[row].value[k] = x, a[row].exponent[k] = exponent_of(x, least);
  }
  void put_b(int k, int column, float x, int least) {
    b.value[k][column] = x, b.exponent[k][column] = exponent_of(x, least);
  }
};

// The exponent of a type's smallest normal number.
int least_exponent(Element element) { return element == Element::f16 ? -14 : -126; }

float low_half(Element element, uint32_t pair) {
  return element == Element::bf16 ? float(BFloat16::from_bits(pair & 0xffff))
                                  : float(Half::from_bits(pair & 0xffff));
}

void gather_16bit(Element element, const Warp& w, Factors& f) {
  const int least = least_exponent(element);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const Lane& l = w.lanes[lane];
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8, k = 2 * t + i / 2 * 8;
      f.put_a(row, k, low_half(element, l.a[i]), least);
      f.put_a(row, k + 1, low_half(element, l.a[i] >> 16), least);
    }
    for (int i = 0; i < 2; ++i) {
      const auto pair = static_cast<uint32_t>(l.bits >> 32 * i);
      f.put_b(2 * t + i * 8, g, low_half(element, pair), least);
      f.put_b(2 * t + i * 8 + 1, g, low_half(element, pair >> 16), least);
    }
  }
}

void gather_tf32(const Warp& w, Factors& f) {
  const int least = least_exponent(Element::tf32);
  const auto number = [](uint64_t bits) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) & 0xffffe000u);
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const Lane& l = w.lanes[lane];
    for (int i = 0; i < 4; ++i) f.put_a(g + i % 2 * 8, t + i / 2 * 4, number(l.a[i]), least);
    for (int i = 0; i < 2; ++i) f.put_b(t + i * 4, g, number(l.bits >> 32 * i), least);
  }
}

void multiply_warp(Element element) {
  const Warp& w = *machine.warp;
  Factors f;
  element == Element::tf32 ? gather_tf32(w, f) : gather_16bit(element, w, f);
  const int depth = element == Element::tf32 ? 8 : 16;
  for (int row = 0; row < kRows; ++row) {
    float c[kColumns];
    const int half = row / 8;
    Lane* lanes = &w.lanes[row % 8 * 4];
    for (int t = 0; t < 4; ++t)
      c[2 * t] = lanes[t].c[2 * half], c[2 * t + 1] = lanes[t].c[2 * half + 1];
    add_products(c, f.a[row], f.b, depth);
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
  machine.called_from(__builtin_return_address(0));
  whole_warp("ldmatrix");
  Lane* self = machine.lane;
  const bool used = self->number % kLanes < count * kMatrixRows;
  if (used && reinterpret_cast<uintptr_t>(row) % kRowBytes != 0) {
    machine.fail("ldmatrix needs row addresses that are multiples of 16");
  }
  self->row = row;
  machine.together(Together::load_matrices, count << 1 | transposed,
                   [=] { load_warp(count, transposed); });
  return self->matrices;
}

Float4 multiply(Element element, Float4 c, Word4 a, uint64_t b) {
  machine.called_from(__builtin_return_address(0));
  whole_warp("mma");
  Lane* self = machine.lane;
  self->c = c, self->a = a, self->bits = b;
  machine.together(Together::multiply, static_cast<int>(element), [=] {
    ++machine.products;
    multiply_warp(element);
  });
  return self->c;
}

}  // namespace pmf::emulator
