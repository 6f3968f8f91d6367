// RMSNorm of one row, optionally followed by a rotation: shared by rms_norm and rotary_qk_norm.
//
// The mathematics is in pmf/rms_norm.h. Each function makes two passes over its row: one for the
// sums, one for the results. The row is read from memory by the first and from cache by the second.
// `Turn` is the orthogonal map that follows the norm: forward(v, i, part) applies it to the vector
// at elements i, i + 1, ..., backward() its transpose.
#pragma once

#include "cpu/rows/rows-inl.h"

namespace pmf::cpu::PMF_LEVEL {

struct NoTurn {
  template <typename V, typename P>
  PMF_INLINE V forward(V v, int64_t, P) const {
    return v;
  }
  template <typename V, typename P>
  PMF_INLINE V backward(V v, int64_t, P) const {
    return v;
  }
};

template <typename A>
PMF_INLINE A scale_of(const RowSum<A>& squares, int64_t width, double eps) {
  return 1 / root(squares.total() / static_cast<A>(width) + static_cast<A>(eps));
}

// y = R (w n)
template <typename T, typename Turn>
PMF_INLINE void norm_row(int64_t width, double eps, Turn turn, const T* x, const T* w, T* y) {
  using A = Acc<T>;
  RowSum<A> xx;
  for_vectors<T>(width, [&](int64_t i, auto part, int slot) PMF_ALWAYS {
    const Vec<A> v = get(x + i, part);
    xx.add(v, v, slot);
  });
  const A s = scale_of(xx, width, eps);
  for_vectors<T>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
    put(y + i, turn.forward(get(x + i, part) * s * get(w + i, part), i, part), part);
  });
}

// y = R (w n), ty = R (w tn + tw n) with tn = g - a n
template <typename T, typename Turn>
PMF_INLINE void norm_row_jvp(int64_t width, double eps, Turn turn, const T* x, const T* tx,
                             const T* w, const T* tw, T* y, T* ty) {
  using A = Acc<T>;
  RowSum<A> xx, xt;
  for_vectors<T>(width, [&](int64_t i, auto part, int slot) PMF_ALWAYS {
    const Vec<A> v = get(x + i, part);
    xx.add(v, v, slot);
    xt.add(v, get(tx + i, part), slot);
  });
  const A s = scale_of(xx, width, eps);
  const A a = s * s * (xt.total() / static_cast<A>(width));
  for_vectors<T>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
    const Vec<A> n = get(x + i, part) * s, g = get(tx + i, part) * s, weight = get(w + i, part);
    put(y + i, turn.forward(n * weight, i, part), part);
    const Vec<A> through_x = (g - a * n) * weight;
    put(ty + i, turn.forward(fma(get(tw + i, part), n, through_x), i, part), part);
  });
}

// dx = s (u - b n) with u = w R^T Y; dw += n R^T Y
template <typename T, typename Turn>
PMF_INLINE void norm_row_backward(int64_t width, double eps, Turn turn, const T* grad, const T* x,
                                  const T* w, T* dx, Acc<T>* dw) {
  using A = Acc<T>;
  RowSum<A> xx, ux;
  for_vectors<T>(width, [&](int64_t i, auto part, int slot) PMF_ALWAYS {
    const Vec<A> v = get(x + i, part);
    const Vec<A> u = turn.backward(get(grad + i, part), i, part) * get(w + i, part);
    xx.add(v, v, slot);
    ux.add(u, v, slot);
  });
  const A s = scale_of(xx, width, eps);
  const A b = s * (ux.total() / static_cast<A>(width));
  for_vectors<T>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
    const Vec<A> n = get(x + i, part) * s, y = turn.backward(get(grad + i, part), i, part);
    put(dx + i, (y * get(w + i, part) - b * n) * s, part);
    accumulate(dw + i, n, y);
  });
}

// The four gradients of pmf/rms_norm.h, Y and T turned back by R^T first.
template <typename T, typename Turn>
PMF_INLINE void norm_row_jvp_backward(int64_t width, double eps, Turn turn, const T* grad,
                                      const T* grad_t, const T* x, const T* tx, const T* w,
                                      const T* tw, T* dx, T* dtx, Acc<T>* dw, Acc<T>* dtw) {
  using A = Acc<T>;
  RowSum<A> xx, xt, ux, ut, vx;
  for_vectors<T>(width, [&](int64_t i, auto part, int slot) PMF_ALWAYS {
    const Vec<A> value = get(x + i, part), tangent = get(tx + i, part), weight = get(w + i, part);
    const Vec<A> y = turn.backward(get(grad + i, part), i, part);
    const Vec<A> t = turn.backward(get(grad_t + i, part), i, part);
    const Vec<A> u = weight * t, v = fma(weight, y, get(tw + i, part) * t);
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
    const Vec<A> n = get(x + i, part) * s, g = get(tx + i, part) * s, weight = get(w + i, part);
    const Vec<A> y = turn.backward(get(grad + i, part), i, part);
    const Vec<A> t = turn.backward(get(grad_t + i, part), i, part);
    const Vec<A> u = weight * t, v = fma(weight, y, get(tw + i, part) * t);
    put(dx + i, (v - a * u - b * g + along * n) * s, part);
    put(dtx + i, (u - b * n) * s, part);
    accumulate(dw + i, n, y);
    accumulate(dw + i, g - a * n, t);
    accumulate(dtw + i, n, t);
  });
}

}  // namespace pmf::cpu::PMF_LEVEL
