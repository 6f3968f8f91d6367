// RMSNorm of one row with an optional rotation after it; shared by rms_norm and rotary_qk_norm.
//
// The mathematics is in pmf/rms_norm.h. Each function makes two passes over its row: one for the
// sums, one for the results. The row is read from memory by the first and from cache by the second.
// Values are summed in the same order whatever the layout of the results: without a rotation,
// rotary_qk_norm is rms_norm, bit for bit.
// `Turn` is the orthogonal map R that follows the norm, of the elements v from i on: forward() is R
// v, backward() is R^T v.
#pragma once

#include "cpu/rows/rows-inl.h"

namespace pmf::cpu::PMF_LEVEL {

// A width that the compiler knows: it unrolls the loops over a row.
template <int64_t width>
struct Width {
  PMF_INLINE constexpr operator int64_t() const { return width; }
};

// A row in layout L: read again in every pass, or, if the compiler knows its width, widened once
// and kept in registers.
template <typename L, typename W = int64_t>
struct Row {
  const Element<L>* data;

  PMF_INLINE explicit Row(const Element<L>* data) : data(data) {}
  template <typename P>
  PMF_INLINE typename L::Value at(int64_t i, P part) const {
    return get<L>(data + i, part);
  }
};
template <typename L, int64_t width>
struct Row<L, Width<width>> {
  static_assert(width % L::kStep == 0, "whole steps");
  typename L::Value values[width / L::kStep];

  PMF_INLINE explicit Row(const Element<L>* data) {
    PMF_UNROLL for (int i = 0; i < width / L::kStep; ++i) values[i] =
        get<L>(data + i * L::kStep, Whole{});
  }
  template <typename P>
  PMF_INLINE typename L::Value at(int64_t i, P) const {
    return values[i / L::kStep];
  }
};

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
template <typename L, typename W, typename Turn, typename T = Element<L>>
PMF_INLINE void norm_row(W width, double eps, Turn turn, const T* x_row, const Row<L, W>& w, T* y) {
  using A = Acc<T>;
  const Row<L, W> x(x_row);
  RowSum<A> xx;
  for_vectors<Fastest<T>>(width, [&](int64_t i, auto part, int slot) PMF_ALWAYS {
    const auto v = get<Fastest<T>>(x_row + i, part);
    xx.add(v, v, slot);
  });
  const A s = scale_of(xx, width, eps);
  for_vectors<L>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
    put(y + i, turn.forward(x.at(i, part) * s * w.at(i, part), i, part), part);
  });
}

// y = R (w n), ty = R (w tn + tw n) with tn = g - a n; without `moving`, tw is zero
template <typename L, typename W, typename Turn, typename T = Element<L>>
PMF_INLINE void norm_row_jvp(W width, double eps, Turn turn, const T* x_row, const T* tx_row,
                             const Row<L, W>& w, const Row<L, W>& tw, bool moving, T* y, T* ty) {
  using A = Acc<T>;
  const Row<L, W> x(x_row), tx(tx_row);
  RowSum<A> xx, xt;
  for_vectors<Fastest<T>>(width, [&](int64_t i, auto part, int slot) PMF_ALWAYS {
    const auto v = get<Fastest<T>>(x_row + i, part);
    xx.add(v, v, slot);
    xt.add(v, get<Fastest<T>>(tx_row + i, part), slot);
  });
  const A s = scale_of(xx, width, eps);
  const A a = s * s * (xt.total() / static_cast<A>(width));
  for_vectors<L>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
    const auto n = x.at(i, part) * s, g = tx.at(i, part) * s;
    put(y + i, turn.forward(n * w.at(i, part), i, part), part);
    auto tangent = (g - a * n) * w.at(i, part);
    if (moving) tangent = fma(n, tw.at(i, part), tangent);
    put(ty + i, turn.forward(tangent, i, part), part);
  });
}

// dx = s (u - b n) with u = w R^T Y; dw += n R^T Y
template <typename L, typename W, typename Turn, typename T = Element<L>>
PMF_INLINE void norm_row_backward(W width, double eps, Turn turn, const T* grad_row, const T* x_row,
                                  const Row<L, W>& w, T* dx, Acc<T>* dw) {
  using A = Acc<T>;
  const Row<L, W> x(x_row), grad(grad_row);
  RowSum<A> xx, ux;
  for_vectors<L>(width, [&](int64_t i, auto part, int slot) PMF_ALWAYS {
    const auto v = x.at(i, part);
    const auto u = turn.backward(grad.at(i, part), i, part) * w.at(i, part);
    xx.add(v, v, slot);
    ux.add(u, v, slot);
  });
  const A s = scale_of(xx, width, eps);
  const A b = s * (ux.total() / static_cast<A>(width));
  for_vectors<L>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
    const auto n = x.at(i, part) * s, y = turn.backward(grad.at(i, part), i, part);
    put(dx + i, (y * w.at(i, part) - b * n) * s, part);
    accumulate(dw + i, n, y);
  });
}

// The four gradients of pmf/rms_norm.h, Y and T turned back by R^T first.
template <typename L, typename W, typename Turn, typename T = Element<L>>
PMF_INLINE void norm_row_jvp_backward(W width, double eps, Turn turn, const T* grad_row,
                                      const T* grad_t_row, const T* x_row, const T* tx_row,
                                      const Row<L, W>& w, const Row<L, W>& tw, T* dx, T* dtx,
                                      Acc<T>* dw, Acc<T>* dtw) {
  using A = Acc<T>;
  const Row<L, W> x(x_row), tx(tx_row), grad(grad_row), grad_t(grad_t_row);
  RowSum<A> xx, xt, ux, ut, vx;
  for_vectors<L>(width, [&](int64_t i, auto part, int slot) PMF_ALWAYS {
    const auto value = x.at(i, part), tangent = tx.at(i, part), weight = w.at(i, part);
    const auto y = turn.backward(grad.at(i, part), i, part);
    const auto t = turn.backward(grad_t.at(i, part), i, part);
    const auto u = weight * t, v = fma(weight, y, tw.at(i, part) * t);
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
  for_vectors<L>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
    const auto n = x.at(i, part) * s, g = tx.at(i, part) * s, weight = w.at(i, part);
    const auto y = turn.backward(grad.at(i, part), i, part);
    const auto t = turn.backward(grad_t.at(i, part), i, part);
    const auto u = weight * t, v = fma(weight, y, tw.at(i, part) * t);
    put(dx + i, (v - a * u - b * g + along * n) * s, part);
    put(dtx + i, (u - b * n) * s, part);
    accumulate(dw + i, n, y);
    accumulate(dw + i, g - a * n, t);
    accumulate(dtw + i, n, t);
  });
}

}  // namespace pmf::cpu::PMF_LEVEL
