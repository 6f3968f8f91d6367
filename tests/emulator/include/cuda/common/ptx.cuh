// The emulator's csrc/cuda/common/ptx.cuh: the same functions, implemented by calls to the runtime.
#pragma once

#include <cstring>

#include "cuda/common/cuda.cuh"

namespace pmf::cuda {

inline uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }

// ---- ldmatrix -----------------------------------------------------------------------------------

template <int kCount, bool kTransposed>
inline void load_matrices(uint32_t (&r)[kCount], const void* row) {
  const emulator::Word4 words = emulator::load_matrices(row, kCount, kTransposed);
  for (int i = 0; i < kCount; ++i) r[i] = words[i];
}

inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { load_matrices<2, false>(r, row); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { load_matrices<4, false>(r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { load_matrices<4, true>(r, row); }

// ---- mma ----------------------------------------------------------------------------------------

template <emulator::Element kElement>
inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const emulator::Float4 sum =
      emulator::multiply(kElement, emulator::Float4{c[0], c[1], c[2], c[3]},
                         emulator::Word4{a[0], a[1], a[2], a[3]}, uint64_t{b[1]} << 32 | b[0]);
  for (int i = 0; i < 4; ++i) c[i] = sum[i];
}

template <typename T>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  constexpr bool kHalf = std::is_same_v<T, __half>;
  multiply<kHalf ? emulator::Element::f16 : emulator::Element::bf16>(c, a, b);
}

inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<emulator::Element::tf32>(c, a, b);
}

// Rounds to nearest, ties away from zero: adds half a unit of the tenth bit to the magnitude.
inline uint32_t round_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (finite ? bits + 0x1000u : bits) & 0xffffe000u;
}

// ---- cp.async -----------------------------------------------------------------------------------

inline void cp_async_16(void* to, const void* from, bool valid = true) {
  emulator::copy_async(to, from, valid);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kPending>
inline void cp_async_wait() {
  emulator::wait_for_copies(kPending);
}

// ---- approximate functions: exact here; .ftz flushes subnormal numbers to zero ------------------

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float exp2_approx(float x) { return flushed(std::exp2(flushed(x))); }
inline float log2_approx(float x) { return std::log2(flushed(x)); }
inline float rcp_approx(float x) { return flushed(1.0f / flushed(x)); }

// ---- two 16-bit numbers in a register -----------------------------------------------------------

template <typename T>
inline uint32_t pack2(float first, float second) {
  return uint32_t{T(second).bits} << 16 | T(first).bits;
}

inline int opaque(int x) { return x; }

// ---- warp collectives and named barriers --------------------------------------------------------

template <typename T>
inline T shuffled(emulator::Shuffle how, T value, int amount) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return __builtin_bit_cast(
      T, static_cast<Bits>(emulator::shuffle(how, __builtin_bit_cast(Bits, value), amount)));
}

template <typename T>
inline T shuffle_xor(T value, int mask) {
  return shuffled(emulator::Shuffle::exclusive_or, value, mask);
}
template <typename T>
inline T shuffle_idx(T value, int lane) {
  return shuffled(emulator::Shuffle::index, value, lane);
}

inline bool any_lane(bool value) { return emulator::ballot(value) != 0; }

inline void barrier_sync(int id, int threads) { emulator::sync_threads(id, threads); }

}  // namespace pmf::cuda
