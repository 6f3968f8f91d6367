// How neighbouring elements of a row lie in registers: in order, or those at even places apart from
// those at odd places.
//
// A layout L of element type T has L::Value, the registers of L::kStep elements, with arithmetic as
// on one vector; get<L>() and put() move them from and to memory. Kernels that work element by
// element take either, and give whatever they read the layout they read it in.
#pragma once

#include <type_traits>

#include "cpu/common/simd-inl.h"

namespace pmf::cpu::PMF_LEVEL {

#define PMF_ALWAYS __attribute__((always_inline))

// The type in which T is computed.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// How many elements a value has: all, or the first n.
struct Whole {};
struct Part {
  int64_t n;
};

template <typename A>
struct Pairs {
  Vec<A> even, odd;
};

template <typename A>
PMF_INLINE Pairs<A> operator+(Pairs<A> a, Pairs<A> b) {
  return {a.even + b.even, a.odd + b.odd};
}
template <typename A>
PMF_INLINE Pairs<A> operator-(Pairs<A> a, Pairs<A> b) {
  return {a.even - b.even, a.odd - b.odd};
}
template <typename A>
PMF_INLINE Pairs<A> operator*(Pairs<A> a, Pairs<A> b) {
  return {a.even * b.even, a.odd * b.odd};
}
template <typename A>
PMF_INLINE Pairs<A> operator*(Pairs<A> a, A b) {
  return {a.even * b, a.odd * b};
}
template <typename A>
PMF_INLINE Pairs<A> operator*(A a, Pairs<A> b) {
  return b * a;
}
template <typename A>
PMF_INLINE Pairs<A> fma(Pairs<A> a, Pairs<A> b, Pairs<A> c) {
  return {fma(a.even, b.even, c.even), fma(a.odd, b.odd, c.odd)};
}

template <typename T>
struct InOrder {
  using Element = T;
  using Value = Vec<Acc<T>>;
  static constexpr int kStep = kLanes<Acc<T>>, kVectors = 1;
};
template <typename T>
struct InPairs {
  using Element = T;
  using Value = Pairs<Acc<T>>;
  static constexpr int kStep = 2 * kLanes<Acc<T>>, kVectors = 2;
};
template <typename L>
using Element = typename L::Element;
// A shift and a mask widen two vectors of bf16 and leave them in pairs; in order it takes four
// instructions, two of them on the one port that shuffles.
template <typename T>
using Fastest = std::conditional_t<std::is_same_v<T, bf16>, InPairs<T>, InOrder<T>>;

struct Even {
  static constexpr int lane(int j) { return 2 * j; }
};
struct Odd {
  static constexpr int lane(int j) { return 2 * j + 1; }
};
// The lanes of even and odd in turn, from lane `first` of each.
template <int first, int lanes>
struct InTurn {
  static constexpr int lane(int j) { return first + j / 2 + j % 2 * lanes; }
};

#if defined(__AVX512BF16__)
struct WordsInTurn {
  alignas(64) uint16_t from[32] = {};

  constexpr WordsInTurn() {
    for (int i = 0; i < 32; ++i) from[i] = static_cast<uint16_t>(InTurn<0, 16>::lane(i));
  }
};
constexpr WordsInTurn kInTurn;
#endif

template <typename T>
PMF_INLINE void load_as(Vec<Acc<T>>& v, const T* p) {
  v = load_float(p);
}
template <typename T>
PMF_INLINE void load_as(Pairs<Acc<T>>& v, const T* p) {
  using A = Acc<T>;
  const Vec<A> low = load_float(p), high = load_float(p + kLanes<A>);
  v = {shuffle<Even>(low, high), shuffle<Odd>(low, high)};
}
PMF_INLINE void load_as(Pairs<float>& v, const bf16* p) {
  const Vec<uint32_t> both = load(reinterpret_cast<const uint32_t*>(p));
  v = {(Vec<float>)(both << 16), (Vec<float>)(both & 0xffff0000)};
}

template <typename T>
PMF_INLINE void store_value(T* p, Vec<Acc<T>> v) {
  store_float(p, v);
}
template <typename T>
PMF_INLINE void store_value(T* p, Pairs<Acc<T>> v) {
  constexpr int lanes = kLanes<Acc<T>>;
  store_float(p, shuffle<InTurn<0, lanes>>(v.even, v.odd));
  store_float(p + lanes, shuffle<InTurn<lanes / 2, lanes>>(v.even, v.odd));
}
PMF_INLINE void store_value(bf16* p, Pairs<float> v) {
#if defined(__AVX512BF16__)
  const auto rounded = (__m512i)_mm512_cvtne2ps_pbh(v.odd, v.even);  // 16 even ones, then 16 odd
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kInTurn.from), rounded));
#else
  const Vec<uint32_t> both = (round_bf16(v.even) >> 16) | (round_bf16(v.odd) & 0xffff0000);
  store(reinterpret_cast<uint32_t*>(p), both);
#endif
}

// The registers of L's elements from p on; those missing in a Part are zero.
template <typename L, typename T>
PMF_INLINE typename L::Value get(const T* p, Whole) {
  typename L::Value v;
  load_as(v, p);
  return v;
}
template <typename L, typename T>
PMF_INLINE typename L::Value get(const T* p, Part part) {
  alignas(kVecBytes) T buffer[L::kStep] = {};
  for (int64_t i = 0; i < part.n; ++i) buffer[i] = p[i];
  return get<L>(buffer, Whole{});
}
template <typename T, typename V>
PMF_INLINE void put(T* p, V v, Whole) {
  store_value(p, v);
}
template <typename T, typename V>
PMF_INLINE void put(T* p, V v, Part part) {
  alignas(kVecBytes) T buffer[sizeof(V) / sizeof(Acc<T>)];
  store_value(buffer, v);
  for (int64_t i = 0; i < part.n; ++i) p[i] = buffer[i];
}

// Prefetches the cache lines of L's elements from p on; p may point anywhere.
template <typename L, typename T>
PMF_INLINE void fetch(const T* p) {
  PMF_UNROLL for (int i = 0; i < L::kStep; i += 64 / sizeof(T)) __builtin_prefetch(p + i);
}
// For writing, in kernels with several streams of stores: stores commit in order, so one that
// misses the cache holds up all the others.
template <typename L, typename T>
PMF_INLINE void fetch_to_write(T* p) {
  PMF_UNROLL for (int i = 0; i < L::kStep; i += 64 / sizeof(T)) __builtin_prefetch(p + i, 1);
}
// The elements by which a kernel that reads and writes in one sweep fetches ahead: 1 KB.
template <typename T>
constexpr int kAhead = 1024 / sizeof(T);

}  // namespace pmf::cpu::PMF_LEVEL
