// SIMD vectors for the current level, written once.
//
// GCC and clang vector extensions do most of the work: Vec<float> is as wide as the level's
// registers (16 bytes portable, 32 AVX2, 64 AVX-512), and + - * / & | << compile to the right
// instructions. Intrinsics are used only if the language has no operator: fused multiply-add, max,
// floor, the exponent trick of exp2, and conversions to and from 16-bit floats.
//
// Everything is in the level's namespace and forced inline, so that no AVX-512 copy of a function
// can be linked into a portable caller.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/common/dispatch.h"

#ifndef PMF_LEVEL
#error "kernel files are compiled once per level with -DPMF_LEVEL=<level>; see dispatch.h"
#endif

#if PMF_X86
// GCC 12's own AVX-512 headers leave "undefined" operands uninitialized on purpose, and then warn.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define PMF_INLINE inline __attribute__((always_inline))
#define PMF_UNROLL _Pragma("GCC unroll 32")

namespace pmf::cpu::PMF_LEVEL {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <typename T, int kBytes = kVecBytes>
struct VecType {
  typedef T type __attribute__((vector_size(kBytes)));
  // The same type without alignment, for pointers into tensors.
  typedef T unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vec = typename VecType<T>::type;
// Integer lanes, for shuffles.
template <typename T>
using IndexVec = decltype(Vec<T>{} == Vec<T>{});
template <typename T>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(T));

// 16-bit floats are for storage only; arithmetic happens after widening.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
// Two bf16 that one vdpbf16ps lane multiplies and adds; the lower half comes first in memory.
struct bf16x2 {
  uint32_t bits;
};

PMF_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
PMF_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
PMF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PMF_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- Loads, stores, broadcasts ------------------------------------------------------------------

template <typename T>
PMF_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecType<T>::unaligned*>(p);
}
template <typename T>
PMF_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecType<T>::unaligned*>(p) = v;
}
PMF_INLINE Vec<float> splat(float x) { return x - Vec<float>{}; }
PMF_INLINE Vec<double> splat(double x) { return x - Vec<double>{}; }
PMF_INLINE Vec<uint32_t> splat(uint32_t x) { return x + Vec<uint32_t>{}; }

// ---- Shuffles -----------------------------------------------------------------------------------

template <int... J>
struct Lanes {};
template <int n, int... J>
struct CountLanes : CountLanes<n - 1, n - 1, J...> {};
template <int... J>
struct CountLanes<0, J...> {
  using type = Lanes<J...>;
};

template <typename From, typename V, int... J>
PMF_INLINE V shuffle_lanes(V a, V b, Lanes<J...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, From::lane(J)...);
#else
  return __builtin_shuffle(a, b, decltype(a == b){From::lane(J)...});
#endif
}

// Lane j of the result is lane From::lane(j) of a followed by b.
template <typename From>
PMF_INLINE Vec<float> shuffle(Vec<float> a, Vec<float> b) {
  return shuffle_lanes<From>(a, b, typename CountLanes<kLanes<float>>::type{});
}
template <typename From>
PMF_INLINE Vec<double> shuffle(Vec<double> a, Vec<double> b) {
  return shuffle_lanes<From>(a, b, typename CountLanes<kLanes<double>>::type{});
}

// ---- Arithmetic without an operator -------------------------------------------------------------

// a * b + c, rounded once if the level has FMA.
PMF_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
PMF_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// a > b ? a : b, so the second argument if either is NaN.
PMF_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
PMF_INLINE Vec<double> max(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_max_pd(a, b);
#elif defined(__AVX2__)
  return _mm256_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

// acc + lo(a) lo(b) + hi(a) hi(b) in every lane, in one instruction. It treats denormals as zero.
#if defined(__AVX512BF16__)
PMF_INLINE Vec<float> dot2(Vec<float> acc, Vec<uint32_t> a, Vec<uint32_t> b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
#endif

// ---- exp2 ---------------------------------------------------------------------------------------

// 2^x for x <= 128, relative error 1e-7 (a minimax polynomial of the fraction, exact at x = 0).
// Results below 2^-126 may be 0; -inf gives 0, NaN stays NaN.
PMF_INLINE Vec<float> exp2(Vec<float> x) {
  constexpr float kC[] = {1.0f,          0.69314704f,   0.24022930f,   0.055485280f,
                          0.0096754517f, 0.0012467845f, 0.00021612919f};
#if defined(__AVX512F__)
  // f = x - floor(x), in one instruction; scalef multiplies by 2^floor(x), also in one.
  const Vec<float> f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  // Adding 1.5 * 2^23 leaves an integer in the low bits. x - 1/2 rounds to floor(x) or, if x is an
  // integer, possibly to x - 1, which gives a fraction of 1 that the polynomial also handles.
  constexpr float kMagic = 12582912.0f;
  x = x < -127.0f ? splat(-127.0f) : x;
  const Vec<float> shifted = (x - 0.5f) + kMagic;
  const Vec<float> f = x - (shifted - kMagic);
#endif
  Vec<float> p = splat(kC[6]);
  PMF_UNROLL for (int i = 5; i >= 0; --i) p = fma(p, f, splat(kC[i]));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, x);
#else
  const Vec<int32_t> exponent = (Vec<int32_t>)shifted + (127 - 0x4B400000);
  const Vec<int32_t> flushed = exponent > 0;  // 2^-127 and below become zero
  return p * (Vec<float>)((exponent << 23) & flushed);
#endif
}

// The same in double, relative error 2e-16, for x <= 1024.
PMF_INLINE Vec<double> exp2(Vec<double> x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  x = x < -1023.0 ? splat(-1023.0) : x;
  const Vec<double> shifted = x + kMagic;
  const Vec<double> f = x - (shifted - kMagic);  // in [-1/2, 1/2]
  // ln(2)^k / k!
  constexpr double kC[] = {
      1.0,
      0.69314718055994530942,
      0.24022650695910071233,
      0.055504108664821579953,
      0.0096181291076284771620,
      0.0013333558146428443423,
      0.00015403530393381609954,
      0.000015252733804059840280,
      1.3215486790144309488e-6,
      1.0178086009239699728e-7,
      7.0549116208011233299e-9,
      4.4455382718708114975e-10,
      2.5678435993488205142e-11,
      1.3691488853904128881e-12,
  };
  Vec<double> p = splat(kC[13]);
  PMF_UNROLL for (int i = 12; i >= 0; --i) p = fma(p, f, splat(kC[i]));
  const Vec<int64_t> exponent = (Vec<int64_t>)shifted - 0x4338000000000000 + 1023;
  const Vec<int64_t> flushed = exponent > 0;
  return p * (Vec<double>)((exponent << 52) & flushed);
}

// ---- scalar conversions of 16-bit floats --------------------------------------------------------

PMF_INLINE float to_float(float x) { return x; }
PMF_INLINE double to_float(double x) { return x; }
PMF_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
PMF_INLINE float to_float(f16 x) {
  // Moves exponent and mantissa to a float's position, then multiplies by 2^112 to change the bias
  // from 15 to 127. Denormals come out right; infinities and NaNs need their exponent restored.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float y;
  std::memcpy(&y, &magnitude, sizeof y);
  y *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &y, sizeof bits);
  if ((x.bits & 0x7c00) == 0x7c00) bits = magnitude | 0x7f800000u;
  bits |= static_cast<uint32_t>(x.bits & 0x8000) << 16;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

// Rounds to nearest even; NaN stays NaN.
template <typename T>
PMF_INLINE T from_float(float x);
template <>
PMF_INLINE float from_float<float>(float x) {
  return x;
}
template <typename T>
PMF_INLINE T from_float(double x) {
  return x;
}
template <>
PMF_INLINE bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40)};
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
template <>
PMF_INLINE f16 from_float<f16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00)};
  if (bits >= 0x47800000u) return f16{static_cast<uint16_t>(sign | 0x7c00)};  // 65536 and above
  if (bits < 0x38800000u) {
    // Under 2^-14: adding 1/2 aligns the mantissa so that the addition itself rounds.
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return f16{static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  bits += 0x0fffu + ((bits >> 13) & 1);  // round; a carry moves into the exponent, even to infinity
  return f16{static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13))};
}

// ---- vector conversions of 16-bit floats --------------------------------------------------------

using VecHalf = VecType<uint16_t, kVecBytes / 2>::type;  // as many 16-bit lanes as Vec<float> has
using VecHalfUnaligned = VecType<uint16_t, kVecBytes / 2>::unaligned;

PMF_INLINE Vec<float> load_float(const float* p) { return load(p); }
PMF_INLINE Vec<float> load_float(const bf16* p) {
  // Widening takes one instruction; GCC 12 emits five for __builtin_convertvector.
#if defined(__AVX512F__)
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec<float>)((Vec<uint32_t>)_mm512_cvtepu16_epi32(h) << 16);
#elif defined(__AVX2__)
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec<float>)((Vec<uint32_t>)_mm256_cvtepu16_epi32(h) << 16);
#else
  const VecHalf h = *reinterpret_cast<const VecHalfUnaligned*>(p);
  return (Vec<float>)(__builtin_convertvector(h, Vec<uint32_t>) << 16);
#endif
}
PMF_INLINE Vec<float> load_float(const f16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// Rounds fp32 to bf16, to nearest even, in the upper half of each lane. The lower is meaningless.
PMF_INLINE Vec<uint32_t> round_bf16(Vec<float> x) {
  const Vec<uint32_t> bits = (Vec<uint32_t>)x;
  return x != x ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
}

PMF_INLINE void store_float(float* p, Vec<float> v) { store(p, v); }
PMF_INLINE void store_float(bf16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(v);
  std::memcpy(p, &h, sizeof h);
#else
  *reinterpret_cast<VecHalfUnaligned*>(p) = __builtin_convertvector(round_bf16(v) >> 16, VecHalf);
#endif
}
PMF_INLINE void store_float(f16* p, Vec<float> v) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
#elif defined(__F16C__)
  const __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = from_float<f16>(v[i]);
#endif
}

// The first n < kLanes elements; the other lanes are zero, and memory past n is not accessed.
template <typename T>
PMF_INLINE Vec<float> load_float_n(const T* p, int64_t n) {
  alignas(kVecBytes) T buffer[kLanes<float>] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load_float(buffer);
}
template <typename T>
PMF_INLINE void store_float_n(T* p, Vec<float> v, int64_t n) {
  alignas(kVecBytes) T buffer[kLanes<float>];
  store_float(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

PMF_INLINE Vec<double> load_float(const double* p) { return load(p); }
PMF_INLINE void store_float(double* p, Vec<double> v) { store(p, v); }

}  // namespace pmf::cpu::PMF_LEVEL
