// Packing for attention: strided tensors of any dtype to tiles of units, and results back.
//
// A unit is what one vector lane multiplies in one step (tile_gemm-inl.h): a float, a double, or
// bf16x2, a pair of bf16 that are neighbours along the depth of a product. There are three layouts:
//
//   rows        dst[row][u]         keys, read one unit at a time (broadcast)
//   depth rows  dst[row / 2][col]   values; for bf16x2 pairs of rows, as P V's depth is the keys
//   columns     dst[u][row]         queries, one row per lane, transposed in registers
//
// All of this is bound by bandwidth: a head's keys and values are packed once per worker and read
// once per panel of queries. Packing also makes rows contiguous, which matters in itself: rows 3 KB
// apart (a [B, N, heads, width] projection) map to a quarter of the cache sets.
#pragma once

#include "cpu/common/tile_gemm-inl.h"
#include "pmf/common.h"

namespace pmf::cpu::PMF_LEVEL {

// ---- A square transpose in registers ------------------------------------------------------------

// {a[mask[i]] or b[mask[i] - lanes]}
template <typename V, typename I>
PMF_INLINE V shuffle(V a, V b, I mask) {
#if defined(__clang__)
  constexpr int kCount = sizeof(V) / sizeof(a[0]);
  V v;
  PMF_UNROLL for (int i = 0; i < kCount; ++i) {
    v[i] = mask[i] < kCount ? a[mask[i]] : b[mask[i] - kCount];
  }
  return v;
#else
  return __builtin_shuffle(a, b, mask);
#endif
}

// Transposes kLanes<T> vectors, the rows of a square matrix, with log2(lanes) perfect shuffles.
template <typename T>
PMF_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int kN = kLanes<T>;
  IndexVec<T> low, high;
  PMF_UNROLL for (int i = 0; i < kN; ++i) {
    low[i] = i / 2 + (i % 2) * kN;
    high[i] = i / 2 + (i % 2) * kN + kN / 2;
  }
  PMF_UNROLL for (int stage = 1; stage < kN; stage *= 2) {
    Vec<T> next[kN];
    PMF_UNROLL for (int i = 0; i < kN / 2; ++i) {
      next[2 * i] = shuffle(rows[i], rows[i + kN / 2], low);
      next[2 * i + 1] = shuffle(rows[i], rows[i + kN / 2], high);
    }
    PMF_UNROLL for (int i = 0; i < kN; ++i) rows[i] = next[i];
  }
}

// dst[c][r] = src[r][c], both dimensions multiples of kLanes<T>.
template <typename T>
inline void transpose_blocks(T* dst, int64_t dst_stride, const T* src, int64_t src_stride,
                             int64_t rows, int64_t cols) {
  constexpr int kN = kLanes<T>;
  for (int64_t r = 0; r < rows; r += kN) {
    for (int64_t c = 0; c < cols; c += kN) {
      Vec<T> block[kN];
      PMF_UNROLL for (int i = 0; i < kN; ++i) block[i] = load(src + (r + i) * src_stride + c);
      transpose<T>(block);
      PMF_UNROLL for (int i = 0; i < kN; ++i) store(dst + (c + i) * dst_stride + r, block[i]);
    }
  }
}

// ---- Rows ---------------------------------------------------------------------------------------

// Packs a row of `count` elements, `stride` apart: converts, and zero-pads to `padded` units.
template <typename Element, typename Unit>
PMF_INLINE void pack_row(Unit* dst, const Element* src, int64_t stride, int64_t count,
                         int64_t padded) {
  constexpr int kN = kLanes<Unit>;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kN <= count; i += kN) store(dst + i, load_float(src + i));
  }
  for (; i < count; ++i) dst[i] = to_float(src[i * stride]);
  for (; i < padded; ++i) dst[i] = Unit(0);
}
PMF_INLINE void pack_row(bf16x2* dst, const bf16* src, int64_t stride, int64_t count,
                         int64_t padded) {
  bf16* d = reinterpret_cast<bf16*>(dst);
  if (stride == 1) {
    std::memcpy(d, src, static_cast<size_t>(count) * sizeof(bf16));
  } else {
    for (int64_t i = 0; i < count; ++i) d[i] = src[i * stride];
  }
  for (int64_t i = count; i < 2 * padded; ++i) d[i] = bf16{0};
}

// dst[row][0 .. padded) = units of rows [0, rows); rows from there to rows_padded are zero.
template <typename Element, typename Unit>
inline void pack_rows(Unit* dst, int64_t padded, const Element* src, int64_t row_stride,
                      int64_t col_stride, int64_t rows, int64_t cols, int64_t rows_padded) {
  for (int64_t r = 0; r < rows; ++r) {
    pack_row(dst + r * padded, src + r * row_stride, col_stride, cols, padded);
  }
  std::memset(static_cast<void*>(dst + rows * padded), 0,
              static_cast<size_t>((rows_padded - rows) * padded) * sizeof(Unit));
}

// The layout in which the product P V reads values: rows, or pairs of rows for bf16x2.
template <typename Element, typename Unit>
inline void pack_depth_rows(Unit* dst, int64_t padded, const Element* src, int64_t row_stride,
                            int64_t col_stride, int64_t rows, int64_t cols) {
  pack_rows(dst, padded, src, row_stride, col_stride, rows, cols, rows);
}
inline void pack_depth_rows(bf16x2* dst, int64_t padded, const bf16* src, int64_t row_stride,
                            int64_t col_stride, int64_t rows, int64_t cols) {
  constexpr int kN = kLanes<float>;
  for (int64_t r = 0; r < rows; r += 2, dst += padded) {
    const bf16* low = src + r * row_stride;
    const bf16* high = low + row_stride;
    const bool pair = r + 1 < rows;
    int64_t c = 0;
    if (col_stride == 1 && pair) {
      for (; c + kN <= cols; c += kN) {
        const Vec<uint32_t> h = (Vec<uint32_t>)load_float(high + c);
        const Vec<uint32_t> l = (Vec<uint32_t>)load_float(low + c);
        store(reinterpret_cast<uint32_t*>(dst + c), h | (l >> 16));
      }
    }
    for (; c < cols; ++c) {
      const uint32_t h = pair ? high[c * col_stride].bits : 0;
      dst[c] = bf16x2{(h << 16) | low[c * col_stride].bits};
    }
    for (; c < padded; ++c) dst[c] = bf16x2{0};
  }
}

// Zeroes rows [depth, depth rounded up to kDepthStep) of an operand B.
template <typename Unit>
PMF_INLINE void clear_units(Unit* b, int64_t depth, int64_t stride) {
  const int64_t rows = round_up(depth, kDepthStep) - depth;
  std::memset(static_cast<void*>(b + depth * stride), 0,
              static_cast<size_t>(rows * stride) * sizeof(Unit));
}

// ---- Queries in, results out --------------------------------------------------------------------

// A unit's lane type for the transpose: bits of the same width.
template <typename Unit>
using LaneOf = typename UnitTraits<Unit>::Lane;

// dst[u][lane] = unit u of row `lane`; lanes past `rows` are zero. `stage` holds lanes x padded
// units. `padded` is `units` rounded up to kLanes; dst has that many rows.
template <typename Element, typename Unit>
inline void pack_columns(Unit* dst, int64_t lanes, const Element* src, int64_t row_stride,
                         int64_t col_stride, int64_t rows, int64_t cols, int64_t padded,
                         Unit* stage) {
  pack_rows(stage, padded, src, row_stride, col_stride, rows, cols, lanes);
  transpose_blocks(reinterpret_cast<LaneOf<Unit>*>(dst), lanes,
                   reinterpret_cast<const LaneOf<Unit>*>(stage), padded, lanes, padded);
}

PMF_INLINE void negate(bf16x2* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i].bits ^= 0x80008000u;
}
template <typename Unit>
PMF_INLINE void negate(Unit* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = -p[i];
}

// Stores rows of results in their dtype: dst[row][col] = stage[row][col], rounded once.
template <typename Element, typename Float>
inline void store_rows(Element* dst, int64_t row_stride, int64_t col_stride, const Float* stage,
                       int64_t padded, int64_t rows, int64_t cols) {
  constexpr int kN = kLanes<Float>;
  for (int64_t r = 0; r < rows; ++r, dst += row_stride, stage += padded) {
    int64_t c = 0;
    if (col_stride == 1) {
      for (; c + kN <= cols; c += kN) store_float(dst + c, load(stage + c));
    }
    for (; c < cols; ++c) dst[c * col_stride] = from_float<Element>(stage[c]);
  }
}

// ---- The same behind function pointers ----------------------------------------------------------

// Kernels are compiled per unit; only these functions know the dtype of the tensors.
template <typename Unit>
struct Packer {
  using Float = Accumulator<Unit>;
  void (*rows)(Unit* dst, int64_t padded, ConstView4 view, int64_t b, int64_t h, int64_t rows,
               int64_t cols, int64_t rows_padded);
  void (*depth_rows)(Unit* dst, int64_t padded, ConstView4 view, int64_t b, int64_t h, int64_t rows,
                     int64_t cols);
  void (*columns)(Unit* dst, int64_t lanes, ConstView4 view, int64_t b, int64_t h, int64_t first,
                  int64_t rows, int64_t cols, int64_t padded, Unit* stage);
  void (*store)(View4 view, int64_t b, int64_t h, int64_t first, const Float* stage, int64_t padded,
                int64_t rows, int64_t cols);
};

template <typename Element>
PMF_INLINE const Element* head_of(const ConstView4& v, int64_t b, int64_t h) {
  return static_cast<const Element*>(v.data) + b * v.stride[0] + h * v.stride[1];
}

template <typename Element, typename Unit>
constexpr Packer<Unit> make_packer() {
  using Float = Accumulator<Unit>;
  return Packer<Unit>{[](Unit* dst, int64_t padded, ConstView4 v, int64_t b, int64_t h,
                         int64_t rows, int64_t cols, int64_t rows_padded) {
                        pack_rows(dst, padded, head_of<Element>(v, b, h), v.stride[2], v.stride[3],
                                  rows, cols, rows_padded);
                      },
                      [](Unit* dst, int64_t padded, ConstView4 v, int64_t b, int64_t h,
                         int64_t rows, int64_t cols) {
                        pack_depth_rows(dst, padded, head_of<Element>(v, b, h), v.stride[2],
                                        v.stride[3], rows, cols);
                      },
                      [](Unit* dst, int64_t lanes, ConstView4 v, int64_t b, int64_t h,
                         int64_t first, int64_t rows, int64_t cols, int64_t padded, Unit* stage) {
                        pack_columns(dst, lanes, head_of<Element>(v, b, h) + first * v.stride[2],
                                     v.stride[2], v.stride[3], rows, cols, padded, stage);
                      },
                      [](View4 v, int64_t b, int64_t h, int64_t first, const Float* stage,
                         int64_t padded, int64_t rows, int64_t cols) {
                        Element* dst = static_cast<Element*>(v.data) + b * v.stride[0] +
                                       h * v.stride[1] + first * v.stride[2];
                        store_rows(dst, v.stride[2], v.stride[3], stage, padded, rows, cols);
                      }};
}

// The functions for fp32 arithmetic on any dtype except fp64.
inline Packer<float> float_packer(DType dtype) {
  if (dtype == DType::bf16) return make_packer<bf16, float>();
  if (dtype == DType::f16) return make_packer<f16, float>();
  return make_packer<float, float>();
}

}  // namespace pmf::cpu::PMF_LEVEL
