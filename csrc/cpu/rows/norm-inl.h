// RMSNorm of rows with an optional rotation after it; shared by rms_norm and rotary_qk_norm.
//
// The mathematics is in pmf/rms_norm.h. Each of its functions is a struct, whose rows run_norm()
// takes through three steps: add() accumulates the sums of row k, factors() turns the sums of many
// rows, one in each lane, into the factors of their results, and finish() computes the results of
// row k, while it prefetches row k + ahead. Forward passes sum in the same order whatever the
// layout of their results: without a rotation, rotary_qk_norm is rms_norm, bit for bit. `turns(k)`
// is the orthogonal map R that follows the norm in row k; its forward() and backward() apply R and
// R^T to the elements from i on.
#pragma once

#include "cpu/rows/rows-inl.h"

namespace pmf::cpu::PMF_LEVEL {

// A width that the compiler knows: it unrolls the loops over a row.
template <int64_t width>
struct Width {
  PMF_INLINE constexpr operator int64_t() const { return width; }
};
template <typename W>
constexpr int kKnownWidth = 0;
template <int64_t width>
constexpr int kKnownWidth<Width<width>> = width;

// keep() stores a value in add(), as it lies in registers, for recall() in finish(). Without a
// width W that the compiler knows there is no room for it: recall() computes it again.
template <typename W, typename A>
PMF_INLINE void keep(A* p, Vec<A> v) {
  if constexpr (kKnownWidth<W> > 0) store(p, v);
}
template <typename W, typename A>
PMF_INLINE void keep(A* p, Pairs<A> v) {
  keep<W>(p, v.even);
  keep<W>(p + kLanes<A>, v.odd);
}
template <typename L, typename W, typename A, typename Again>
PMF_INLINE typename L::Value recall(const A* p, const Again& again) {
  if constexpr (kKnownWidth<W> == 0) {
    return again();
  } else if constexpr (L::kVectors == 1) {
    return load(p);
  } else {
    return {load(p), load(p + kLanes<A>)};
  }
}

// A row of weights in layout L: read again for every row, or, if the compiler knows its width,
// widened once and kept in registers.
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
  PMF_INLINE NoTurn operator()(int64_t) const { return {}; }
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
PMF_INLINE Vec<A> scale_of(Vec<A> squares, int64_t width, double eps) {
  return A{1} / root(squares / static_cast<A>(width) + static_cast<A>(eps));
}

// y = R (w n)
template <typename L, typename W, typename Turns>
struct Norm {
  using T = Element<L>;
  using A = Acc<T>;
  static constexpr int kSums = 1, kOperands = 1, kKept = 0;
  W width;
  double eps;
  const Row<L, W>& w;
  Turns turns;
  Stretch<const T> x;
  Stretch<T> y;

  PMF_INLINE void add(int64_t k, RowSum<A>* xx, A*) const {
    for_vectors<Fastest<T>>(width, [&](int64_t i, auto part, int slot) PMF_ALWAYS {
      const auto v = get<Fastest<T>>(x[k] + i, part);
      xx->add(v, v, slot);
    });
  }
  PMF_INLINE void factors(Vec<A>* c) const { c[0] = scale_of<A>(c[0], width, eps); }
  PMF_INLINE void finish(int64_t k, const A* c, const A*, int64_t ahead) const {
    const auto turn = turns(k);
    for_vectors<L>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
      fetch<L>(x[k + ahead] + i);
      const auto n = get<L>(x[k] + i, part) * c[0];
      put(y[k] + i, turn.forward(n * w.at(i, part), i, part), part);
    });
  }
};

// y = R (w n), ty = R (w tn + tw n) with tn = g - a n; without `moving`, tw is zero
template <typename L, typename W, typename Turns>
struct NormJvp {
  using T = Element<L>;
  using A = Acc<T>;
  static constexpr int kSums = 2, kOperands = 2, kKept = 0;
  W width;
  double eps;
  const Row<L, W>&w, &tw;
  bool moving;
  Turns turns;
  Stretch<const T> x, tx;
  Stretch<T> y, ty;

  PMF_INLINE void add(int64_t k, RowSum<A>* sums, A*) const {
    RowSum<A>&xx = sums[0], &xt = sums[1];
    for_vectors<Fastest<T>>(width, [&](int64_t i, auto part, int slot) PMF_ALWAYS {
      fetch_to_write<Fastest<T>>(y[k] + i);
      fetch_to_write<Fastest<T>>(ty[k] + i);
      const auto v = get<Fastest<T>>(x[k] + i, part);
      xx.add(v, v, slot);
      xt.add(v, get<Fastest<T>>(tx[k] + i, part), slot);
    });
  }
  PMF_INLINE void factors(Vec<A>* c) const {
    c[0] = scale_of<A>(c[0], width, eps);
    c[1] = c[0] * c[0] * (c[1] / static_cast<A>(width));
  }
  PMF_INLINE void finish(int64_t k, const A* c, const A*, int64_t ahead) const {
    const auto turn = turns(k);
    const A s = c[0], a = c[1];
    for_vectors<L>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
      fetch<L>(x[k + ahead] + i);
      fetch<L>(tx[k + ahead] + i);
      const auto n = get<L>(x[k] + i, part) * s, g = get<L>(tx[k] + i, part) * s;
      put(y[k] + i, turn.forward(n * w.at(i, part), i, part), part);
      auto tangent = (g - a * n) * w.at(i, part);
      if (moving) tangent = fma(n, tw.at(i, part), tangent);
      put(ty[k] + i, turn.forward(tangent, i, part), part);
    });
  }
};

// dx = s (u - b n) with u = w R^T Y; dw += n R^T Y
template <typename L, typename W, typename Turns>
struct NormBackward {
  using T = Element<L>;
  using A = Acc<T>;
  static constexpr int kSums = 2, kOperands = 2, kKept = kKnownWidth<W>;
  W width;
  double eps;
  const Row<L, W>& w;
  Turns turns;
  Stretch<const T> grad, x;
  Stretch<T> dx;
  A* dw;

  PMF_INLINE void add(int64_t k, RowSum<A>* sums, A* kept) const {
    const auto turn = turns(k);
    RowSum<A>&xx = sums[0], &ux = sums[1];
    for_vectors<L>(width, [&](int64_t i, auto part, int slot) PMF_ALWAYS {
      fetch_to_write<L>(dx[k] + i);
      const auto v = get<L>(x[k] + i, part);
      const auto y = turn.backward(get<L>(grad[k] + i, part), i, part), u = y * w.at(i, part);
      keep<W>(kept + i, y);
      xx.add(v, v, slot);
      ux.add(u, v, slot);
    });
  }
  PMF_INLINE void factors(Vec<A>* c) const {
    c[0] = scale_of<A>(c[0], width, eps);
    c[1] = c[0] * (c[1] / static_cast<A>(width));
  }
  PMF_INLINE void finish(int64_t k, const A* c, const A* kept, int64_t ahead) const {
    const auto turn = turns(k);
    const A s = c[0], b = c[1];
    for_vectors<L>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
      fetch<L>(x[k + ahead] + i);
      fetch<L>(grad[k + ahead] + i);
      const auto n = get<L>(x[k] + i, part) * s;
      const auto y = recall<L, W>(
          kept + i, [&]() PMF_ALWAYS { return turn.backward(get<L>(grad[k] + i, part), i, part); });
      put(dx[k] + i, (y * w.at(i, part) - b * n) * s, part);
      accumulate(dw + i, n, y);
    });
  }
};

// The four gradients of pmf/rms_norm.h, Y and T turned back by R^T first.
template <typename L, typename W, typename Turns>
struct NormJvpBackward {
  using T = Element<L>;
  using A = Acc<T>;
  static constexpr int kSums = 5, kOperands = 4, kKept = 2 * kKnownWidth<W>;
  W width;
  double eps;
  const Row<L, W>&w, &tw;
  Turns turns;
  Stretch<const T> grad, grad_t, x, tx;
  Stretch<T> dx, dtx;
  A *dw, *dtw;

  PMF_INLINE void add(int64_t k, RowSum<A>* sums, A* kept) const {
    const auto turn = turns(k);
    RowSum<A>&xx = sums[0], &xt = sums[1], &ux = sums[2], &ut = sums[3], &vx = sums[4];
    for_vectors<L>(width, [&](int64_t i, auto part, int slot) PMF_ALWAYS {
      fetch_to_write<L>(dx[k] + i);
      fetch_to_write<L>(dtx[k] + i);
      const auto value = get<L>(x[k] + i, part), tangent = get<L>(tx[k] + i, part);
      const auto y = turn.backward(get<L>(grad[k] + i, part), i, part);
      const auto t = turn.backward(get<L>(grad_t[k] + i, part), i, part);
      keep<W>(kept + i, y);
      keep<W>(kept + kKnownWidth<W> + i, t);
      const auto u = w.at(i, part) * t, v = fma(w.at(i, part), y, tw.at(i, part) * t);
      xx.add(value, value, slot);
      xt.add(value, tangent, slot);
      ux.add(u, value, slot);
      ut.add(u, tangent, slot);
      vx.add(v, value, slot);
    });
  }
  PMF_INLINE void factors(Vec<A>* v) const {
    const A mean = 1 / static_cast<A>(width);
    const Vec<A> s = scale_of<A>(v[0], width, eps);
    const Vec<A> a = s * s * (v[1] * mean), b = s * (v[2] * mean);
    const Vec<A> c = s * (v[3] * mean), d = s * (v[4] * mean);
    v[0] = s;
    v[1] = a;
    v[2] = b;
    v[3] = 3 * a * b - c - d;
  }
  PMF_INLINE void finish(int64_t k, const A* c, const A* kept, int64_t ahead) const {
    const auto turn = turns(k);
    const A s = c[0], a = c[1], b = c[2], along = c[3];
    for_vectors<L>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
      fetch<L>(x[k + ahead] + i);
      fetch<L>(tx[k + ahead] + i);
      fetch<L>(grad[k + ahead] + i);
      fetch<L>(grad_t[k + ahead] + i);
      const auto n = get<L>(x[k] + i, part) * s, g = get<L>(tx[k] + i, part) * s;
      const auto y = recall<L, W>(
          kept + i, [&]() PMF_ALWAYS { return turn.backward(get<L>(grad[k] + i, part), i, part); });
      const auto t = recall<L, W>(kept + kKnownWidth<W> + i, [&]() PMF_ALWAYS {
        return turn.backward(get<L>(grad_t[k] + i, part), i, part);
      });
      const auto u = w.at(i, part) * t, v = fma(w.at(i, part), y, tw.at(i, part) * t);
      put(dx[k] + i, (v - a * u - b * g + along * n) * s, part);
      put(dtx[k] + i, (u - b * n) * s, part);
      accumulate(dw + i, n, y);
      accumulate(dw + i, g - a * n, t);
      accumulate(dtw + i, n, t);
    });
  }
};

// Runs the first `count` rows of a norm's operands.
//
// All results of a row wait for its factors, the end of a long chain of dependent instructions, and
// an out-of-order processor looks about one narrow row ahead. So rows go in blocks, of up to one
// for each lane of a vector: first their sums, then all their factors at once, then their results.
// The rows of a block fit in a small part of the L1 cache; a row that is too wide for that gives
// the processor enough to do by itself. A norm may keep kKept values of each row between the steps.
template <typename Rows>
PMF_INLINE void run_norm(const Rows& norm, int64_t count) {
  using A = typename Rows::A;
  constexpr int lanes = kLanes<A>, kSums = Rows::kSums;
  constexpr int64_t kBlockBytes = 1 << 12;
  const int64_t row_bytes = Rows::kOperands * norm.width * sizeof(typename Rows::T);
  const int64_t size = max64(1, min64(lanes, kBlockBytes / max64(1, row_bytes)));
  alignas(kVecBytes) A kept[lanes * Rows::kKept + 1];
  for (int64_t first = 0; first < count; first += size) {
    const int64_t rows = min64(size, count - first);
    Vec<A> sums[kSums][lanes];
    for (int64_t k = 0; k < rows; ++k) {
      RowSum<A> of_row[kSums];
      norm.add(first + k, of_row, kept + k * Rows::kKept);
      PMF_UNROLL for (int j = 0; j < kSums; ++j) sums[j][k] = of_row[j].lanes();
    }
    Vec<A> factors[kSums];
    PMF_UNROLL for (int j = 0; j < kSums; ++j) factors[j] = sum_each<A>(sums[j], rows);
    norm.factors(factors);
    for (int64_t k = 0; k < rows; ++k) {
      A of_row[kSums];
      PMF_UNROLL for (int j = 0; j < kSums; ++j) of_row[j] = factors[j][k];
      norm.finish(first + k, of_row, kept + k * Rows::kKept, rows);
    }
  }
}

}  // namespace pmf::cpu::PMF_LEVEL
