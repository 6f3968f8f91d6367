// Online softmax of one score tile and its tangent, with queries on the lanes.
//
// Per query (lane), before a tile: m = running maximum of the scores (log-2 units), p = pivot,
//   l = sum P,   r = sum P (tS - p),   P = 2^(s - m).
// The tangent of attention is invariant to a constant subtracted from a row of tS. p tracks the
// row's mean tangent, so H = P o (tS - p) and r stay small, and the cancellation in (H V) - r O
// happens before rounding:
//   rescale  a = 2^(m_old - m_new):  l *= a, r *= a                     (the caller rescales O, tO)
//   delta  = (r + sum P (tS - p)) / (l + sum P)       unrounded P, this tile included
//   p += delta,  r -= delta l                                           (the caller: tO -= delta O)
//   l += sum round(P),  r += sum round(P o (tS - p))  the rounded values that the products read
// All sums run along keys, down the tile, independently in each lane.
//
// Cost per vector of scores: 2^x takes 8 instructions with AVX-512, the rest of the three sweeps
// about 16, against 6 D / kDepth for the products (192 in bf16 at D = 64). A tile and its tangent,
// at most 24 KB, stay in the L1 cache between sweeps.
#pragma once

#include "cpu/attention/attention_mask-inl.h"

namespace pmf::cpu::PMF_LEVEL {

// Up to this magnitude, rounding s * factor costs at most 1/4, so it is harmless that m was rounded
// and the product in fma(s, factor, -m) is not.
template <typename Float>
constexpr Float kLargestUnrounded = sizeof(Float) == 4 ? Float(0x1p22) : Float(0x1p51);

// Whether any lane of any vector exceeds `limit` in magnitude.
template <int kN, typename Float>
PMF_INLINE bool any_beyond(const Vec<Float> (&x)[kN], Float limit) {
  Vec<Float> largest = {};
  PMF_UNROLL for (int j = 0; j < kN; ++j) largest = max(x[j] < 0 ? -x[j] : x[j], largest);
  Float lanes[kLanes<Float>];
  store(lanes, largest);
  bool beyond = false;
  for (int i = 0; i < kLanes<Float>; ++i) beyond |= lanes[i] > limit;
  return beyond;
}

// s *= factor, rounded: from here on every use sees the same value of a score.
template <int kN, typename Float>
inline void scale_scores(Float* s, int64_t keys, Float factor) {
  for (int64_t i = 0; i < keys * kN; ++i) {
    store(s + i * kLanes<Float>, load(s + i * kLanes<Float>) * factor);
  }
}

// Row statistics of a panel, kN vectors of lanes each.
template <int kN, typename Float>
struct RowState {
  Vec<Float> max[kN], sum[kN];        // m, l
  Vec<Float> tangent[kN], pivot[kN];  // r, p
  // How the caller rescales O and tO before adding this tile's products.
  Vec<Float> rescale[kN], delta[kN];

  void reset() {
    for (int j = 0; j < kN; ++j) {
      max[j] = splat(-kInfinity<Float>);
      sum[j] = tangent[j] = pivot[j] = rescale[j] = delta[j] = Vec<Float>{};
    }
  }
};

// Writes one unit (kDepth rows) of P or H and returns the sum of the rounded values.
template <typename Unit>
struct UnitWriter {
  static PMF_INLINE Vec<Unit> write(Unit* dst, const Vec<Unit> (&rows)[1]) {
    store(dst, rows[0]);
    return rows[0];
  }
};

#if defined(__AVX512BF16__)
template <>
struct UnitWriter<bf16x2> {
  static PMF_INLINE Vec<float> write(bf16x2* dst, const Vec<float> (&rows)[2]) {
    // The conversion puts row 1's sixteen values above row 0's; the permutation interleaves them.
    using Vec16 = VecType<uint16_t>::type;
    Vec16 order;
    PMF_UNROLL for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + (i % 2) * 16);
    const Vec<uint32_t> pairs = (Vec<uint32_t>)_mm512_permutexvar_epi16(
        (__m512i)order, (__m512i)_mm512_cvtne2ps_pbh(rows[1], rows[0]));
    store(reinterpret_cast<uint32_t*>(dst), pairs);
    return (Vec<float>)(pairs << 16) + (Vec<float>)(pairs & 0xffff0000u);
  }
};
#endif

// Turns scores s[key][lane] into p (units, kDepth keys deep) and, if kTangent, tangents ts into h.
// s * factor is in log-2 units and ts * scale is tS. p may alias s, and h may alias ts, if a unit
// is a Float.
template <int kN, bool kTangent, typename Unit, typename Float = Accumulator<Unit>>
inline void softmax_tile(RowState<kN, Float>& state, Float* s, Float* ts, Unit* p, Unit* h,
                         int64_t keys, Float factor, Float scale) {
  constexpr int kStep = kLanes<Float>;
  constexpr int kLanesW = kN * kStep;
  constexpr int kDepth = UnitTraits<Unit>::kDepth;

  // Maximum. If a score is NaN, `max` returns its second argument: m is never NaN, the row's P is.
  Vec<Float> top[kN];
  PMF_UNROLL for (int j = 0; j < kN; ++j) top[j] = splat(-kInfinity<Float>);
  for (int64_t i = 0; i < keys; ++i) {
    PMF_UNROLL for (int j = 0; j < kN; ++j) top[j] = max(load(s + i * kLanesW + j * kStep), top[j]);
  }
  PMF_UNROLL for (int j = 0; j < kN; ++j) top[j] = top[j] * factor;
  // Scores beyond 4 million (a diverging model): half an ulp of m is a large exponent.
  if (factor != Float(1) && any_beyond(top, kLargestUnrounded<Float>)) {
    scale_scores<kN>(s, keys, factor);
    factor = 1;
  }
  Vec<Float> m[kN], sum_p[kN], sum_h[kN];
  PMF_UNROLL for (int j = 0; j < kN; ++j) {
    const Vec<Float> now = max(top[j], state.max[j]);
    // A row that has attended nothing yet has m = -inf; using 0 instead keeps -inf - m = -inf.
    m[j] = now == -kInfinity<Float> ? Vec<Float>{} : now;
    state.rescale[j] = exp2(state.max[j] - m[j]);
    state.max[j] = now;
    sum_p[j] = sum_h[j] = Vec<Float>{};
  }

  // Unrounded P, and the sums that determine the pivot.
  for (int64_t i = 0; i < keys; ++i) {
    PMF_UNROLL for (int j = 0; j < kN; ++j) {
      const int64_t at = i * kLanesW + j * kStep;
      const Vec<Float> e = exp2(fma(load(s + at), splat(factor), -m[j]));
      store(s + at, e);
      sum_p[j] += e;
      if constexpr (kTangent) {
        sum_h[j] = fma(e, fma(load(ts + at), splat(scale), -state.pivot[j]), sum_h[j]);
      }
    }
  }
  Vec<Float> sum[kN], tangent[kN], pivot[kN];
  PMF_UNROLL for (int j = 0; j < kN; ++j) {
    sum[j] = state.sum[j] * state.rescale[j];
    if constexpr (kTangent) {
      const Vec<Float> r = state.tangent[j] * state.rescale[j];
      const Vec<Float> mass = sum[j] + sum_p[j];
      const Vec<Float> delta = (r + sum_h[j]) / mass;
      state.delta[j] = mass == Float(0) ? Vec<Float>{} : delta;
      state.pivot[j] = pivot[j] = state.pivot[j] + state.delta[j];
      tangent[j] = fma(-state.delta[j], sum[j], r);
    }
  }

  // Rounds P and H to units; l and r add the stored values. P in full precision stays in place and
  // its sum is known, so that out is bitwise the same with and without tangents.
  constexpr bool kRounds = kDepth > 1;
  if constexpr (!kRounds) {
    PMF_UNROLL for (int j = 0; j < kN; ++j) sum[j] = fma(state.sum[j], state.rescale[j], sum_p[j]);
  }
  if constexpr (kRounds || kTangent) {
    for (int64_t i = 0; i < keys; i += kDepth) {
      PMF_UNROLL for (int j = 0; j < kN; ++j) {
        Vec<Float> e[kDepth], x[kDepth];
        PMF_UNROLL for (int d = 0; d < kDepth; ++d) {
          const int64_t at = (i + d) * kLanesW + j * kStep;
          const bool inside = d == 0 || i + d < keys;
          e[d] = inside ? load(s + at) : Vec<Float>{};
          if constexpr (kTangent) {
            x[d] = inside ? e[d] * fma(load(ts + at), splat(scale), -pivot[j]) : Vec<Float>{};
          }
        }
        const int64_t to = (i / kDepth) * kLanesW + j * kStep;
        if constexpr (kRounds) sum[j] += UnitWriter<Unit>::write(p + to, e);
        if constexpr (kTangent) tangent[j] += UnitWriter<Unit>::write(h + to, x);
      }
    }
  }
  PMF_UNROLL for (int j = 0; j < kN; ++j) {
    state.sum[j] = sum[j];
    if constexpr (kTangent) state.tangent[j] = tangent[j];
  }
}

}  // namespace pmf::cpu::PMF_LEVEL
