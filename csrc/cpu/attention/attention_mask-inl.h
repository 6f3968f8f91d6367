// Masks for one score tile, with queries on the lanes: S^T[key][lane].
//
// From here on scores are in log-2 units: s <- s * factor + mask * log2(e), or -inf where masked.
// Masked tangents become 0, so that the contents of a masked key cannot reach the result (values:
// attention_hidden-inl.h). A mask row runs along keys, a tile's vectors along queries, so mask rows
// are converted into a small square stage and transposed in registers, as queries are. A mask
// shared by all queries (a padding mask) skips that: it is one scalar per key.
#pragma once

#include "cpu/attention/attention_pack-inl.h"
#include "cpu/attention/attention_sequences-inl.h"
#include "pmf/attention.h"

namespace pmf::cpu::PMF_LEVEL {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

template <typename Float>
constexpr Float kInfinity = static_cast<Float>(__builtin_huge_val());
template <typename Float>
constexpr Float kLargest = sizeof(Float) == 4 ? static_cast<Float>(3.4028234663852886e38)
                                              : static_cast<Float>(1.7976931348623157e308);

// The position of a tile: keys [key, key + keys), queries [query, query + queries) of one head.
struct TilePlace {
  int64_t batch, head;
  int64_t query, queries;
  int64_t key, keys;
};

// An additive mask value times log2(e). The largest finite values stay finite, so that a row masked
// with nothing else still averages.
template <typename Float>
PMF_INLINE Float mask_bias(Float x) {
  const Float y = x * static_cast<Float>(kLog2e);
  return y < -kLargest<Float> && x >= -kLargest<Float> ? -kLargest<Float> : y;
}

template <typename Float, typename Source>
inline void mask_row_from(Float* dst, const Source* src, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    dst[i] = mask_bias<Float>(static_cast<Float>(to_float(src[i * stride])));
  }
}
template <typename Float>
inline void mask_row_from(Float* dst, const uint8_t* src, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dst[i] = src[i * stride] != 0 ? Float(0) : -kInfinity<Float>;
}

// Converts `count` mask elements, `stride` apart, from element `offset` on.
template <typename Float>
inline void mask_row(Float* dst, const AttentionMask& mask, int64_t offset, int64_t stride,
                     int64_t count) {
  const void* data = mask.view.data;
  if (mask.kind == MaskKind::boolean) {
    mask_row_from(dst, static_cast<const uint8_t*>(data) + offset, stride, count);
  } else if (mask.dtype == DType::f32) {
    mask_row_from(dst, static_cast<const float*>(data) + offset, stride, count);
  } else if (mask.dtype == DType::bf16) {
    mask_row_from(dst, static_cast<const bf16*>(data) + offset, stride, count);
  } else if (mask.dtype == DType::f16) {
    mask_row_from(dst, static_cast<const f16*>(data) + offset, stride, count);
  } else {
    mask_row_from(dst, static_cast<const double*>(data) + offset, stride, count);
  }
}

// Fills bias[key][lane] for a tile of kLanesW lanes, with 0 in lanes past the queries. `bias` has
// `keys` rows, rounded up to kLanes.
template <int kLanesW, typename Float>
inline void mask_tile(Float* bias, const AttentionMask& mask, const TilePlace& place) {
  constexpr int kN = kLanes<Float>;
  const int64_t* stride = mask.view.stride;
  const int64_t offset = place.batch * stride[0] + place.head * stride[1] +
                         place.query * stride[2] + place.key * stride[3];
  Float stage[kN * kN];
  if (stride[2] == 0) {
    for (int64_t key = 0; key < place.keys; key += kN) {
      const int64_t count = min64(kN, place.keys - key);
      mask_row(stage, mask, offset + key * stride[3], stride[3], count);
      for (int64_t i = 0; i < count; ++i) {
        for (int j = 0; j < kLanesW; j += kN)
          store(bias + (key + i) * kLanesW + j, splat(stage[i]));
      }
    }
    return;
  }
  for (int64_t key = 0; key < place.keys; key += kN) {
    const int64_t count = min64(kN, place.keys - key);
    for (int64_t lane = 0; lane < kLanesW; lane += kN) {
      std::memset(stage, 0, sizeof stage);
      const int64_t rows = min64(kN, place.queries - lane);
      for (int64_t i = 0; i < rows; ++i) {
        mask_row(stage + i * kN, mask, offset + (lane + i) * stride[2] + key * stride[3], stride[3],
                 count);
      }
      transpose_blocks(bias + key * kLanesW + lane, kLanesW, stage, kN, kN, kN);
    }
  }
}

// Applies mask and window to the tile of raw scores `s`, and zeroes masked elements of `others`.
template <int kN, int kOthers, typename Float>
inline void apply_mask(Float* s, Float* const (&others)[kOthers], Float factor,
                       const AttentionMask& mask, const AttentionWindow& window,
                       const TilePlace& place, Float* bias) {
  constexpr int kStep = kLanes<Float>;
  constexpr int kLanesW = kN * kStep;
  const bool masked = mask.kind != MaskKind::none;
  const bool windowed = crosses_window(window, place);
  if (masked) mask_tile<kLanesW>(bias, mask, place);
  Vec<Float> lane_index;
  PMF_UNROLL for (int i = 0; i < kStep; ++i) lane_index[i] = static_cast<Float>(i);
  for (int64_t i = 0; i < place.keys; ++i) {
    // Lane q sees the key where first <= q <= last.
    const int64_t key = place.key + i - place.query;
    const Float first = static_cast<Float>(key - window.right);
    const Float last = static_cast<Float>(key + window.left);
    for (int j = 0; j < kLanesW; j += kStep) {
      const int64_t at = i * kLanesW + j;
      Vec<Float> b = masked ? load(bias + at) : Vec<Float>{};
      if (windowed) {
        const Vec<Float> lane = lane_index + static_cast<Float>(j);
        b = (lane < first) | (lane > last) ? splat(-kInfinity<Float>) : b;
      }
      const auto closed = b == -kInfinity<Float>;
      store(s + at, closed ? b : fma(load(s + at), splat(factor), b));
      PMF_UNROLL for (int n = 0; n < kOthers; ++n) {
        if (others[n] != nullptr) {
          store(others[n] + at, closed ? Vec<Float>{} : load(others[n] + at));
        }
      }
    }
  }
}

}  // namespace pmf::cpu::PMF_LEVEL
