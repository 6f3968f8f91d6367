// RMSNorm of one row with an optional rotation after it; shared by rms_norm and rotary_qk_norm.
//
// The mathematics is in pmf/rms_norm.h. Each function makes two passes over its row: one for the
// sums, one for the results. The row is read from memory by the first and from cache by the second.
// `Turn` is the orthogonal map R that follows the norm, of the vector v at elements i, i + 1, ...:
// weighted() is R (w v), weighted_t() is R (tw v), backward() is R^T v.
#pragma once

#include "cpu/rows/rows-inl.h"

namespace pmf::cpu::PMF_LEVEL {

// A width that the compiler knows: it unrolls the loops over a row.
template <int64_t width>
struct Width {
  PMF_INLINE constexpr operator int64_t() const { return width; }
};

// A row: read again in every pass, or, if the compiler knows its width, widened once and kept in
// registers.
template <typename T, typename W = int64_t>
struct Row {
  const T* data;

  PMF_INLINE explicit Row(const T* data) : data(data) {}
  template <typename P>
  PMF_INLINE Vec<Acc<T>> get(int64_t i, P part) const {
    return cpu::PMF_LEVEL::get(data + i, part);
  }
};
template <typename T, int64_t width>
struct Row<T, Width<width>> {
  static_assert(width % kStep<T> == 0, "whole vectors");
  Vec<Acc<T>> vectors[width / kStep<T>];

  PMF_INLINE explicit Row(const T* data) {
    PMF_UNROLL for (int i = 0; i < width / kStep<T>; ++i) vectors[i] =
        load_float(data + i * kStep<T>);
  }
  template <typename P>
  PMF_INLINE Vec<Acc<T>> get(int64_t i, P) const {
    return vectors[i / kStep<T>];
  }
};

struct NoTurn {
  template <typename V, typename R, typename P>
  PMF_INLINE V weighted(V v, const R& w, int64_t i, P part) const {
    return v * w.get(i, part);
  }
  template <typename V, typename R, typename P>
  PMF_INLINE V weighted_t(V v, const R& tw, int64_t i, P part) const {
    return v * tw.get(i, part);
  }
  template <typename V, typename P>
  PMF_INLINE V backward(V v, int64_t, P) const {
    return v;
  }
};

// Whether any element is not zero: the tangent of a weight usually is.
template <typename T>
PMF_INLINE bool moves(const T* tw, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    if (!(to_float(tw[i]) == 0)) return true;
  }
  return false;
}

template <typename A>
PMF_INLINE A scale_of(const RowSum<A>& squares, int64_t width, double eps) {
  return 1 / root(squares.total() / static_cast<A>(width) + static_cast<A>(eps));
}

// y = R (w n)
template <typename T, typename W, typename Turn>
PMF_INLINE void norm_row(W width, double eps, Turn turn, const T* x_row, const Row<T, W>& w, T* y) {
  using A = Acc<T>;
  const Row<T, W> x(x_row);
  RowSum<A> xx;
  for_vectors<T>(width, [&](int64_t i, auto part, int slot) PMF_ALWAYS {
    const Vec<A> v = x.get(i, part);
    xx.add(v, v, slot);
  });
  const A s = scale_of(xx, width, eps);
  for_vectors<T>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
    put(y + i, turn.weighted(x.get(i, part) * s, w, i, part), part);
  });
}

// y = R (w n), ty = R (w tn + tw n) with tn = g - a n; without `moving`, tw is zero
template <typename T, typename W, typename Turn>
PMF_INLINE void norm_row_jvp(W width, double eps, Turn turn, const T* x_row, const T* tx_row,
                             const Row<T, W>& w, const Row<T, W>& tw, bool moving, T* y, T* ty) {
  using A = Acc<T>;
  const Row<T, W> x(x_row), tx(tx_row);
  RowSum<A> xx, xt;
  for_vectors<T>(width, [&](int64_t i, auto part, int slot) PMF_ALWAYS {
    const Vec<A> v = x.get(i, part);
    xx.add(v, v, slot);
    xt.add(v, tx.get(i, part), slot);
  });
  const A s = scale_of(xx, width, eps);
  const A a = s * s * (xt.total() / static_cast<A>(width));
  for_vectors<T>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
    const Vec<A> n = x.get(i, part) * s, g = tx.get(i, part) * s;
    put(y + i, turn.weighted(n, w, i, part), part);
    Vec<A> tangent = turn.weighted(g - a * n, w, i, part);
    if (moving) tangent += turn.weighted_t(n, tw, i, part);
    put(ty + i, tangent, part);
  });
}

// dx = s (u - b n) with u = w R^T Y; dw += n R^T Y
template <typename T, typename W, typename Turn>
PMF_INLINE void norm_row_backward(W width, double eps, Turn turn, const T* grad_row, const T* x_row,
                                  const Row<T, W>& w, T* dx, Acc<T>* dw) {
  using A = Acc<T>;
  const Row<T, W> x(x_row), grad(grad_row);
  RowSum<A> xx, ux;
  for_vectors<T>(width, [&](int64_t i, auto part, int slot) PMF_ALWAYS {
    const Vec<A> v = x.get(i, part);
    const Vec<A> u = turn.backward(grad.get(i, part), i, part) * w.get(i, part);
    xx.add(v, v, slot);
    ux.add(u, v, slot);
  });
  const A s = scale_of(xx, width, eps);
  const A b = s * (ux.total() / static_cast<A>(width));
  for_vectors<T>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
    const Vec<A> n = x.get(i, part) * s, y = turn.backward(grad.get(i, part), i, part);
    put(dx + i, (y * w.get(i, part) - b * n) * s, part);
    accumulate(dw + i, n, y);
  });
}

// The four gradients of pmf/rms_norm.h, Y and T turned back by R^T first.
template <typename T, typename W, typename Turn>
PMF_INLINE void norm_row_jvp_backward(W width, double eps, Turn turn, const T* grad_row,
                                      const T* grad_t_row, const T* x_row, const T* tx_row,
                                      const Row<T, W>& w, const Row<T, W>& tw, T* dx, T* dtx,
                                      Acc<T>* dw, Acc<T>* dtw) {
  using A = Acc<T>;
  const Row<T, W> x(x_row), tx(tx_row), grad(grad_row), grad_t(grad_t_row);
  RowSum<A> xx, xt, ux, ut, vx;
  for_vectors<T>(width, [&](int64_t i, auto part, int slot) PMF_ALWAYS {
    const Vec<A> value = x.get(i, part), tangent = tx.get(i, part), weight = w.get(i, part);
    const Vec<A> y = turn.backward(grad.get(i, part), i, part);
    const Vec<A> t = turn.backward(grad_t.get(i, part), i, part);
    const Vec<A> u = weight * t, v = fma(weight, y, tw.get(i, part) * t);
    xx.add(value, value, slot);
    xt.add(value, tangent, slot);
    ux.add(u, value, slot);
    ut.add(u, tangent, slot);
    vx.add(v, value, slot);
  });
  const A s = scale_of(xx, width, eps), mean = 1 / static_cast<A>(width);
  const A a = s * s * (xt.total() * mean), b = s * (ux.total() * mean);
  const A c = s * (ut.total() * mean), d = s * (vx.total() * mean);
  const A along = 3 * a * b - c - d;
  for_vectors<T>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
    const Vec<A> n = x.get(i, part) * s, g = tx.get(i, part) * s, weight = w.get(i, part);
    const Vec<A> y = turn.backward(grad.get(i, part), i, part);
    const Vec<A> t = turn.backward(grad_t.get(i, part), i, part);
    const Vec<A> u = weight * t, v = fma(weight, y, tw.get(i, part) * t);
    put(dx + i, (v - a * u - b * g + along * n) * s, part);
    put(dtx + i, (u - b * n) * s, part);
    accumulate(dw + i, n, y);
    accumulate(dw + i, g - a * n, t);
    accumulate(dtw + i, n, t);
  });
}

}  // namespace pmf::cpu::PMF_LEVEL
