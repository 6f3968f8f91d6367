// Per-head RMSNorm and rotary embedding on the CPU. The mathematics is in pmf/rotary_qk_norm.h, the
// norm of a row (one head of one token) in norm.h.
//
// cos and sin are expanded once per call to the full width, sin with alternating sign, so that a
// turn is two multiplications and one swap of neighbours: y = n o cos + swap(n) o sin. Rows are
// walked in the order they lie in memory, heads inside tokens or tokens inside heads. In units of
// query plus key the forward moves 2, its tangent 2 more, the backward 3 or 6: copy bandwidth is
// the bound.
#include "pmf/rotary_qk_norm.h"

#include "cpu/rows/norm-inl.h"

namespace pmf::cpu::PMF_LEVEL {
namespace {

// (a, b, c, d, ...) -> (b, a, d, c, ...)
PMF_INLINE Vec<float> swap_pairs(Vec<float> v) {
  const Vec<uint64_t> pairs = (Vec<uint64_t>)v;
  return (Vec<float>)((pairs << 32) | (pairs >> 32));
}
PMF_INLINE Vec<double> swap_pairs(Vec<double> v) {
  Vec<double> swapped = v;
  PMF_UNROLL for (int i = 0; i < kLanes<double>; i += 2) {
    swapped[i] = v[i + 1];
    swapped[i + 1] = v[i];
  }
  return swapped;
}

template <typename A>
struct Rotation {
  const A *cos, *sin;  // [D] of one token: (c0, c0, c1, c1, ...) and (-s0, s0, -s1, s1, ...)

  template <typename P>
  PMF_INLINE Vec<A> forward(Vec<A> v, int64_t i, P part) const {
    return fma(swap_pairs(v), get(sin + i, part), v * get(cos + i, part));
  }
  template <typename P>
  PMF_INLINE Vec<A> backward(Vec<A> v, int64_t i, P part) const {
    return v * get(cos + i, part) - swap_pairs(v) * get(sin + i, part);
  }
};

// The spread tables [P + 1, D] in the caller's scratch; row P is the identity.
template <typename A>
struct Tables {
  const A *cos, *sin;
  int64_t width, first, rotated;  // tokens from `first` on are rotated

  explicit Tables(const RotaryShape& s)
      : width(s.width), first(s.tokens - s.rotated), rotated(s.rotated) {
    A *c = static_cast<A*>(s.tables), *d = c + (rotated + 1) * width;
    cos = c;
    sin = d;
    const A *from_cos = static_cast<const A*>(s.cos), *from_sin = static_cast<const A*>(s.sin);
    for (int64_t i = 0; i < rotated * width / 2; ++i) {
      c[2 * i] = c[2 * i + 1] = from_cos[i];
      d[2 * i] = -from_sin[i];
      d[2 * i + 1] = from_sin[i];
    }
    for (int64_t i = rotated * width; i < (rotated + 1) * width; ++i) {
      c[i] = 1;
      d[i] = 0;
    }
  }
  PMF_INLINE Rotation<A> at(int64_t token) const {
    const int64_t row = (token < first ? rotated : token - first) * width;
    return {cos + row, sin + row};
  }
};

// Walks the rows of a [B, heads, N, D] view, the dimension with the smaller stride innermost.
struct HeadCursor {
  int64_t heads, tokens, b, h, n;
  bool heads_inside;

  PMF_INLINE HeadCursor(int64_t heads, int64_t tokens, const int64_t* stride, int64_t row)
      : heads(heads), tokens(tokens), heads_inside(stride[1] < stride[2]) {
    const int64_t inner = heads_inside ? heads : tokens, outer = heads_inside ? tokens : heads;
    const int64_t i = row % inner, o = row / inner % outer;
    b = row / (inner * outer);
    h = heads_inside ? i : o;
    n = heads_inside ? o : i;
  }
  PMF_INLINE void next() {
    int64_t &inner = heads_inside ? h : n, &outer = heads_inside ? n : h;
    if (++inner < (heads_inside ? heads : tokens)) return;
    inner = 0;
    if (++outer < (heads_inside ? tokens : heads)) return;
    outer = 0;
    ++b;
  }
  template <typename T>
  PMF_INLINE const T* at(const ConstView4& v) const {
    return static_cast<const T*>(v.data) + b * v.stride[0] + h * v.stride[1] + n * v.stride[2];
  }
  template <typename T>
  PMF_INLINE T* at(const View4& v) const {
    return static_cast<T*>(v.data) + b * v.stride[0] + h * v.stride[1] + n * v.stride[2];
  }
};

template <typename T>
void forward(const RotaryQkNormParams& p, const ParallelFor& parallel) {
  const RotaryShape& s = p.shape;
  const Tables<Acc<T>> tables(s);
  for (const RotaryHeads& side : p.sides) {
    const T *w = static_cast<const T*>(side.weight), *tw = static_cast<const T*>(side.weight_t);
    const bool tangent = side.x_t.data != nullptr;
    auto range = [&](int64_t begin, int64_t end) {
      HeadCursor row(side.heads, s.tokens, side.x.stride, begin);
      for (int64_t r = begin; r < end; ++r, row.next()) {
        const auto turn = tables.at(row.n);
        if (tangent) {
          norm_row_jvp(s.width, s.eps, turn, row.at<T>(side.x), row.at<T>(side.x_t), w, tw,
                       row.at<T>(side.y), row.at<T>(side.y_t));
        } else {
          norm_row(s.width, s.eps, turn, row.at<T>(side.x), w, row.at<T>(side.y));
        }
      }
    };
    parallel_ranges(parallel, s.batch * side.heads * s.tokens, row_grain(s.width), range);
  }
}

template <typename T>
void backward(const RotaryQkNormBackwardParams& p, const ParallelFor& parallel) {
  const RotaryShape& s = p.shape;
  const Tables<Acc<T>> tables(s);
  for (const RotaryHeadsBackward& side : p.sides) {
    const T *w = static_cast<const T*>(side.weight), *tw = static_cast<const T*>(side.weight_t);
    const int64_t rows = s.batch * side.heads * s.tokens;
    const RowSums sums(rows, s.width);
    const bool tangent = side.grad_t.data != nullptr;
    auto run = [&](int64_t first, int64_t last, Acc<T>* dw) {
      HeadCursor row(side.heads, s.tokens, side.x.stride, first);
      for (int64_t r = first; r < last; ++r, row.next()) {
        const auto turn = tables.at(row.n);
        if (tangent) {
          norm_row_jvp_backward(s.width, s.eps, turn, row.at<T>(side.grad), row.at<T>(side.grad_t),
                                row.at<T>(side.x), row.at<T>(side.x_t), w, tw,
                                row.at<T>(side.grad_x), row.at<T>(side.grad_x_t), dw,
                                dw + sums.pitch);
        } else {
          norm_row_backward(s.width, s.eps, turn, row.at<T>(side.grad), row.at<T>(side.x), w,
                            row.at<T>(side.grad_x), dw);
        }
      }
    };
    const int kinds = tangent ? 2 : 1;
    for_runs<Acc<T>>(sums, 1, rows, kinds, p.workspace, parallel, run);
    add_runs<T>(sums, 1, s.width, kinds, 0, p.workspace, side.grad_weight, parallel);
    if (tangent) add_runs<T>(sums, 1, s.width, 2, 1, p.workspace, side.grad_weight_t, parallel);
  }
}

}  // namespace

void rotary_qk_norm(const RotaryQkNormParams& params, const ParallelFor& parallel) {
  with_type(params.shape.dtype,
            [&](auto type) { forward<typename decltype(type)::type>(params, parallel); });
}

void rotary_qk_norm_backward(const RotaryQkNormBackwardParams& params,
                             const ParallelFor& parallel) {
  with_type(params.shape.dtype,
            [&](auto type) { backward<typename decltype(type)::type>(params, parallel); });
}

}  // namespace pmf::cpu::PMF_LEVEL

PMF_DISPATCH(void, rotary_qk_norm, (const RotaryQkNormParams& params, const ParallelFor& parallel),
             (params, parallel))
PMF_DISPATCH(void, rotary_qk_norm_backward,
             (const RotaryQkNormBackwardParams& params, const ParallelFor& parallel),
             (params, parallel))
