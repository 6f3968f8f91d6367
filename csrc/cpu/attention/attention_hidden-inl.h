// Keeps values hidden by a mask out of the result: padding is often uninitialised memory.
//
// A hidden score is -inf and its P exactly 0, but 0 times NaN is NaN, so products with P (or with
// anything derived from it) must not read a hidden number that is inf or NaN. Calls with a mask or
// window therefore scan a head's packed keys and values once, in whole vectors. Any number that is
// not finite, which is rare,
//
// - is zeroed in the packed copy, and its key recorded, so that the products need no change;
// - is restored for the queries that see it: the forward adds weight times value where the weight
//   is not 0 (attention_panel-inl.h), the backward sets the key's scores to NaN before masking.
//
// Cost: one pass over packed memory per head, against 2 Nq FMAs per number; none without a mask.
#pragma once

#include "cpu/attention/attention_pack-inl.h"

namespace pmf::cpu::PMF_LEVEL {

// Flags for a key: which of its rows had an element that is not finite.
enum Spoiled : uint8_t { kKey = 1, kKeyTangent = 2, kValue = 4, kValueTangent = 8 };

// Whether `count` numbers (whole vectors) are finite: x - x is 0 if finite, otherwise NaN.
template <typename T>
inline bool all_finite(const T* p, int64_t count) {
  Vec<T> sum = {};
  for (int64_t i = 0; i < count; i += kLanes<T>) sum += load(p + i) - load(p + i);
  bool finite = true;
  for (int i = 0; i < kLanes<T>; ++i) finite &= sum[i] == T(0);
  return finite;
}
inline bool all_finite(const bf16x2* p, int64_t count) {
  constexpr uint32_t kLow = 0x7f80, kHigh = 0x7f800000;
  Vec<uint32_t> found = {};
  for (int64_t i = 0; i < count; i += kLanes<uint32_t>) {
    const Vec<uint32_t> u = load(reinterpret_cast<const uint32_t*>(p + i));
    found |= (Vec<uint32_t>)((u & kLow) == kLow) | (Vec<uint32_t>)((u & kHigh) == kHigh);
  }
  bool finite = true;
  for (int i = 0; i < kLanes<uint32_t>; ++i) finite &= found[i] == 0;
  return finite;
}

// Reads or zeroes one of the kDepth numbers in a unit.
template <typename T>
PMF_INLINE T unit_number(const T& unit, int64_t) {
  return unit;
}
PMF_INLINE float unit_number(const bf16x2& unit, int64_t part) {
  return to_float(bf16{static_cast<uint16_t>(part == 0 ? unit.bits : unit.bits >> 16)});
}
template <typename T>
PMF_INLINE void clear_number(T& unit, int64_t) {
  unit = T(0);
}
PMF_INLINE void clear_number(bf16x2& unit, int64_t part) {
  unit.bits &= part == 0 ? 0xffff0000u : 0x0000ffffu;
}

// The same for a vector of units.
PMF_INLINE Vec<float> unit_numbers(const float* p, int64_t) { return load(p); }
PMF_INLINE Vec<double> unit_numbers(const double* p, int64_t) { return load(p); }
PMF_INLINE Vec<float> unit_numbers(const bf16x2* p, int64_t part) {
  const Vec<uint32_t> u = load(reinterpret_cast<const uint32_t*>(p));
  return (Vec<float>)(part == 0 ? u << 16 : u & 0xffff0000u);
}

template <typename T>
PMF_INLINE bool is_finite(T x) {
  return x - x == T(0);
}

// Zeroes number `part` of each of `count` units if it is not finite; returns whether any was not.
template <typename Unit>
inline bool clear_spoiled(Unit* units, int64_t count, int64_t part) {
  bool found = false;
  for (int64_t i = 0; i < count; ++i) {
    if (is_finite(unit_number(units[i], part))) continue;
    clear_number(units[i], part);
    found = true;
  }
  return found;
}

// Cleans and records `keys` keys packed as rows of `padded` units; returns whether any changed.
template <typename Unit>
inline bool clear_spoiled_rows(Unit* rows, int64_t padded, int64_t keys, uint8_t* spoiled,
                               Spoiled what) {
  if (rows == nullptr || all_finite(rows, keys * padded)) return false;
  for (int64_t key = 0; key < keys; ++key) {
    for (int64_t part = 0; part < UnitTraits<Unit>::kDepth; ++part) {
      if (clear_spoiled(rows + key * padded, padded, part)) spoiled[key] |= what;
    }
  }
  return true;
}

// The same for keys packed as depth rows of kDepth keys each.
template <typename Unit>
inline bool clear_spoiled_depth_rows(Unit* rows, int64_t padded, int64_t keys, uint8_t* spoiled,
                                     Spoiled what) {
  constexpr int kDepth = UnitTraits<Unit>::kDepth;
  if (rows == nullptr || all_finite(rows, ceil_div(keys, kDepth) * padded)) return false;
  for (int64_t key = 0; key < keys; ++key) {
    if (clear_spoiled(rows + key / kDepth * padded, padded, key % kDepth)) spoiled[key] |= what;
  }
  return true;
}

}  // namespace pmf::cpu::PMF_LEVEL
