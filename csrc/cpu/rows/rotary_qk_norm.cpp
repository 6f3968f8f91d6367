// Per-head RMSNorm and rotary embedding on the CPU. The mathematics is in pmf/rotary_qk_norm.h, the
// norm of a row (one head of one token) in norm.h.
//
// cos and sin are expanded once per call to the full width, sin with alternating sign, so that a
// turn is two multiplications and one swap of neighbours: y = n o cos + swap(n) o sin. The
// forward's tables contain the norm's weights, too. Rows are walked in the order they lie in
// memory, heads inside tokens or tokens inside heads. In units of query plus key the forward moves
// 2, its tangent 2 more, the backward 3 or 6: copy bandwidth is the bound.
#include "pmf/rotary_qk_norm.h"

#include <type_traits>

#include "cpu/rows/norm-inl.h"

namespace pmf::cpu::PMF_LEVEL {
namespace {

// (a, b, c, d, ...) -> (b, a, d, c, ...)
struct Swapped {
  static constexpr int lane(int j) { return j ^ 1; }
};

// cos and sin of one token, [D] each: (c0, c0, c1, c1, ...) and (-s0, s0, -s1, s1, ...).
template <typename A>
struct Rotation {
  const A *cos, *sin;

  template <typename P>
  PMF_INLINE Vec<A> forward(Vec<A> v, int64_t i, P part) const {
    return fma(shuffle<Swapped>(v, v), get(sin + i, part), v * get(cos + i, part));
  }
  template <typename P>
  PMF_INLINE Vec<A> backward(Vec<A> v, int64_t i, P part) const {
    return v * get(cos + i, part) - shuffle<Swapped>(v, v) * get(sin + i, part);
  }
};

// R w and R tw, whose tables contain the weights.
template <typename A>
struct WeightedRotation {
  Rotation<A> by_weight, by_weight_t;

  template <typename R, typename P>
  PMF_INLINE Vec<A> weighted(Vec<A> v, const R&, int64_t i, P part) const {
    return by_weight.forward(v, i, part);
  }
  template <typename R, typename P>
  PMF_INLINE Vec<A> weighted_t(Vec<A> v, const R&, int64_t i, P part) const {
    return by_weight_t.forward(v, i, part);
  }
};

// The spread tables [P + 1, D] in the caller's scratch; row P is the identity. With a weight, that
// of R w: R's columns, each times its element of the weight.
template <typename A>
struct Tables {
  const A *cos, *sin;
  int64_t width, first, rotated;  // tokens from `first` on are rotated

  template <typename T>
  PMF_INLINE Tables(const RotaryShape& s, int which, const T* weight)
      : width(s.width), first(s.tokens - s.rotated), rotated(s.rotated) {
    const int64_t size = (rotated + 1) * width;
    A *c = static_cast<A*>(s.tables) + 2 * which * size, *d = c + size;
    cos = c;
    sin = d;
    const A *from_cos = static_cast<const A*>(s.cos), *from_sin = static_cast<const A*>(s.sin);
    A* w = c + rotated * width;
    for (int64_t i = 0; i < width; ++i) {
      w[i] = weight == nullptr ? A(1) : A(to_float(weight[i]));
      w[i + size] = 0;
    }
    for (int64_t token = 0; token < rotated; ++token, c += width, d += width) {
      _Pragma("GCC ivdep") for (int64_t i = 0; i < width / 2; ++i) {
        const A x = *from_cos++, y = *from_sin++, even = w[2 * i], odd = w[2 * i + 1];
        c[2 * i] = x * even;
        c[2 * i + 1] = x * odd;
        d[2 * i] = -y * odd;
        d[2 * i + 1] = y * even;
      }
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
  // The dimension of the view that changes from row to row, and the rows until it starts again.
  PMF_INLINE int inner() const { return heads_inside ? 1 : 2; }
  PMF_INLINE int64_t left() const { return heads_inside ? heads - h : tokens - n; }
  // At most to there.
  PMF_INLINE void skip(int64_t count) {
    int64_t &inner = heads_inside ? h : n, &outer = heads_inside ? n : h;
    if ((inner += count) < (heads_inside ? heads : tokens)) return;
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

// body(cursor, count) for stretches of rows that lie a constant distance apart,
// stride[cursor.inner()] of each view.
template <typename Body>
PMF_INLINE void for_stretches(int64_t heads, int64_t tokens, const int64_t* stride, int64_t begin,
                              int64_t end, const Body& body) {
  HeadCursor row(heads, tokens, stride, begin);
  while (begin < end) {
    const int64_t count = min64(end - begin, row.left());
    body(row, count);
    row.skip(count);
    begin += count;
  }
}

// The widths of heads that get code of their own, in the dtypes that networks run in.
template <typename T, typename Body>
PMF_INLINE void with_width(int64_t width, const Body& body) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bf16>) {
    if (width == 64) return body(Width<64>{});
  }
  body(width);
}

template <typename T, bool kTangent, typename W>
PMF_INLINE void forward_rows(const RotaryShape& s, const RotaryHeads& side, W width,
                             const Tables<Acc<T>>& tables, const Tables<Acc<T>>& tables_t,
                             bool moving, int64_t begin, int64_t end) {
  const Row<T, W> w(static_cast<const T*>(side.weight));
  const auto stretch = [&](const HeadCursor& row, int64_t count) PMF_ALWAYS {
    const int d = row.inner();
    const T *x = row.at<T>(side.x), *tx = kTangent ? row.at<T>(side.x_t) : nullptr;
    T *y = row.at<T>(side.y), *ty = kTangent ? row.at<T>(side.y_t) : nullptr;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t token = row.n + (d == 2 ? k : 0);
      const WeightedRotation<Acc<T>> turn{tables.at(token), tables_t.at(token)};
      if constexpr (kTangent) {
        norm_row_jvp(width, s.eps, turn, x, tx, w, w, moving, y, ty);
        tx += side.x_t.stride[d];
        ty += side.y_t.stride[d];
      } else {
        norm_row(width, s.eps, turn, x, w, y);
      }
      x += side.x.stride[d];
      y += side.y.stride[d];
    }
  };
  for_stretches(side.heads, s.tokens, side.x.stride, begin, end, stretch);
}

template <typename T, bool kTangent>
void forward(const RotaryQkNormParams& p, const ParallelFor& parallel) {
  const RotaryShape& s = p.shape;
  for (const RotaryHeads& side : p.sides) {
    const T *w = static_cast<const T*>(side.weight), *tw = static_cast<const T*>(side.weight_t);
    const bool moving = kTangent && moves(tw, s.width);
    const Tables<Acc<T>> tables(s, 0, w);
    const Tables<Acc<T>> tables_t = moving ? Tables<Acc<T>>(s, 1, tw) : tables;
    with_width<T>(s.width, [&](auto width) {
      const auto rows = [&](int64_t begin, int64_t end) {
        forward_rows<T, kTangent>(s, side, width, tables, tables_t, moving, begin, end);
      };
      parallel_ranges(parallel, s.batch * side.heads * s.tokens, row_grain(s.width), rows);
    });
  }
}

template <typename T, bool kTangent, typename W>
PMF_INLINE void backward_rows(const RotaryShape& s, const RotaryHeadsBackward& side, W width,
                              const Tables<Acc<T>>& tables, int64_t begin, int64_t end, Acc<T>* dw,
                              Acc<T>* dtw) {
  const Row<T, W> w(static_cast<const T*>(side.weight));
  const Row<T, W> tw(static_cast<const T*>(kTangent ? side.weight_t : side.weight));
  const auto stretch = [&](const HeadCursor& row, int64_t count) PMF_ALWAYS {
    const int d = row.inner();
    const T *x = row.at<T>(side.x), *tx = kTangent ? row.at<T>(side.x_t) : nullptr;
    const T *y = row.at<T>(side.grad), *ty = kTangent ? row.at<T>(side.grad_t) : nullptr;
    T *dx = row.at<T>(side.grad_x), *dtx = kTangent ? row.at<T>(side.grad_x_t) : nullptr;
    for (int64_t k = 0; k < count; ++k) {
      const auto turn = tables.at(row.n + (d == 2 ? k : 0));
      if constexpr (kTangent) {
        norm_row_jvp_backward(width, s.eps, turn, y, ty, x, tx, w, tw, dx, dtx, dw, dtw);
        tx += side.x_t.stride[d];
        ty += side.grad_t.stride[d];
        dtx += side.grad_x_t.stride[d];
      } else {
        norm_row_backward(width, s.eps, turn, y, x, w, dx, dw);
      }
      x += side.x.stride[d];
      y += side.grad.stride[d];
      dx += side.grad_x.stride[d];
    }
  };
  for_stretches(side.heads, s.tokens, side.x.stride, begin, end, stretch);
}

template <typename T, bool kTangent>
void backward(const RotaryQkNormBackwardParams& p, const ParallelFor& parallel) {
  const RotaryShape& s = p.shape;
  const Tables<Acc<T>> tables(s, 0, static_cast<const T*>(nullptr));
  constexpr int kinds = kTangent ? 2 : 1;
  for (const RotaryHeadsBackward& side : p.sides) {
    const int64_t rows = s.batch * side.heads * s.tokens;
    const RowSums sums(rows, s.width);
    with_width<T>(s.width, [&](auto width) {
      const auto run = [&](int64_t begin, int64_t end, Acc<T>* dw) {
        backward_rows<T, kTangent>(s, side, width, tables, begin, end, dw, dw + sums.pitch);
      };
      for_runs<Acc<T>>(sums, 1, rows, kinds, p.workspace, parallel, run);
    });
    add_runs<T>(sums, 1, s.width, kinds, 0, p.workspace, side.grad_weight, parallel);
    if (kTangent) add_runs<T>(sums, 1, s.width, 2, 1, p.workspace, side.grad_weight_t, parallel);
  }
}

}  // namespace

void rotary_qk_norm(const RotaryQkNormParams& params, const ParallelFor& parallel) {
  with_type(params.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    params.sides[0].x_t.data == nullptr ? forward<T, false>(params, parallel)
                                        : forward<T, true>(params, parallel);
  });
}

void rotary_qk_norm_backward(const RotaryQkNormBackwardParams& params,
                             const ParallelFor& parallel) {
  with_type(params.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    params.sides[0].grad_t.data == nullptr ? backward<T, false>(params, parallel)
                                           : backward<T, true>(params, parallel);
  });
}

}  // namespace pmf::cpu::PMF_LEVEL

PMF_DISPATCH(void, rotary_qk_norm, (const RotaryQkNormParams& params, const ParallelFor& parallel),
             (params, parallel))
PMF_DISPATCH(void, rotary_qk_norm_backward,
             (const RotaryQkNormBackwardParams& params, const ParallelFor& parallel),
             (params, parallel))
