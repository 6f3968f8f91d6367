// Online softmax of a warp's score tile and its tangent, in the layout of mma accumulators.
//
// Per query, before a tile: m = running maximum of the scores (log-2 units), p = pivot,
//   l = sum P,   r = sum P (tS - p),   P = 2^(s - m).
// The tangent of attention is invariant to a constant subtracted from a row of tS. p tracks the
// row's mean tangent, so H = P o (tS - p) and r stay small, and the cancellation in (H V) - r O
// happens before rounding:
//
//   rescale   a = 2^(m_old - m_new):  l *= a, r *= a            (the caller: O *= a, tO *= a)
//   delta     = (r + sum P (tS - p)) / (l + sum P)              (unrounded P, this tile included)
//             p += delta,  r -= delta l                         (the caller: tO -= delta O)
//   sums      l += sum round(P),  r += sum round(P o (tS - p))  (the rounded values the mma reads)
//
// The last two are products with ones: tensor cores sum the very values that they multiply.
#pragma once

#include "cuda/attention/attention_sequences.cuh"
#include "cuda/attention/attention_tile.cuh"

namespace pmf::cuda {

// Up to this magnitude, rounding s * factor costs at most 1/4, so it is harmless that m was rounded
// and the product in fma(s, factor, -m) is not.
constexpr float kLargestUnrounded = 4194304.0f;

// The state of a lane's two rows, g and g + 8, of a 16-row tile.
struct RowState {
  float top[2] = {-INFINITY, -INFINITY};              // m
  float sum[2] = {}, tangent[2] = {}, pivot[2] = {};  // l, r, p
  float rescale[2], delta[2];                         // what the caller applies to O and tO
};

// The query and key of a lane's first score in a tile.
struct ScorePlace {
  int batch, head, query, key;
};

// Converts raw scores to log-2 units: c log2(e) S plus mask, or -inf where masked. Masked tangents
// become 0, so that the contents of a masked key cannot reach the result. kEndOnly: only keys past
// the end are masked.
template <bool kTangent, bool kEndOnly, int kTiles>
__device__ inline void mask_scores(float (&s)[kTiles][4], float (&ts)[kTiles][4],
                                   const AttentionParams& p, const Window& window,
                                   const Sequence& sequence, const ScorePlace& place,
                                   float factor) {
  const int64_t* stride = p.mask.view.stride;
  const int64_t head = int64_t(place.batch) * stride[0] + int64_t(place.head) * stride[1];
  const bool masked = !kEndOnly && p.mask.kind != MaskKind::none;
  const int queries = sequence.queries, keys = sequence.keys;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int query = place.query + 8 * (e / 2), key = place.key + 8 * j + e % 2;
      float bias = 0.0f;
      if (key >= keys || (!kEndOnly && hides(window, query, key))) {
        bias = -INFINITY;
      } else if (masked && query < queries) {
        bias = mask_bias(p.mask, head + int64_t(query) * stride[2] + int64_t(key) * stride[3]);
      }
      s[j][e] = bias == -INFINITY ? bias : fmaf(s[j][e], factor, bias);
      if (kTangent && bias == -INFINITY) ts[j][e] = 0.0f;
    }
  }
}

// Turns scores s into P and, if kTangent, their tangents ts into H. s * factor is in log-2 units
// and ts * scale is tS. The caller still has to compute l = a l + sum P, as one operation because
// out must be bitwise the same with and without tangents, and r += sum H.
template <bool kTangent, int kTiles>
__device__ inline void softmax_tile(RowState& state, float (&s)[kTiles][4], float (&ts)[kTiles][4],
                                    float factor, float scale) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    // fmaxf ignores NaN: m is never NaN, but the row's P will be.
    float top = -INFINITY, row_factor = factor;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) top = fmaxf(top, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
    top = quad_max(top) * factor;
    // Scores beyond 4 million (a diverging model): half an ulp of m is a large exponent.
    if (any_lane(fabsf(top) > kLargestUnrounded)) {
      const bool large = fabsf(top) > kLargestUnrounded;
      row_factor = large ? 1.0f : factor;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        s[j][2 * h] *= large ? factor : 1.0f, s[j][2 * h + 1] *= large ? factor : 1.0f;
      }
    }
    const float now = fmaxf(top, state.top[h]);
    // A row that has attended nothing yet has m = -inf; using 0 instead keeps -inf - m = -inf.
    const float m = now == -INFINITY ? 0.0f : now;
    const float rescale = exp2_approx(state.top[h] - m);
    state.top[h] = now;
    state.rescale[h] = rescale;

    float sum = 0.0f, sum_t = 0.0f;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        s[j][e] = exp2_approx(fmaf(s[j][e], row_factor, -m));
        if constexpr (kTangent) {
          sum += s[j][e];
          sum_t = fmaf(s[j][e], fmaf(ts[j][e], scale, -state.pivot[h]), sum_t);
        }
      }
    }
    if constexpr (kTangent) {
      const float l = state.sum[h] * rescale, r = state.tangent[h] * rescale;
      const float mass = l + quad_sum(sum);
      const float mean = (r + quad_sum(sum_t)) * rcp_approx(mass);
      const float delta = mass == 0.0f ? 0.0f : mean;
      const float pivot = state.pivot[h] + delta;
      state.delta[h] = delta;
      state.pivot[h] = pivot;
      state.tangent[h] = fmaf(-delta, l, r);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          ts[j][e] = s[j][e] * fmaf(ts[j][e], scale, -pivot);
        }
      }
    }
  }
}

}  // namespace pmf::cuda
