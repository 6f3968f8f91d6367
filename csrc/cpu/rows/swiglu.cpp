// silu(gate) up on the CPU. The mathematics is in pmf/swiglu.h.
//
// Reads every operand once, row by row. In units of one [rows, W] tensor, the forward moves 3, its
// tangent 3 more, the backward 5 or 10. An element costs one exponential (a polynomial), one
// division and a few multiplications, hidden by memory traffic in fp32. Rounded once, at the store.
#include "pmf/swiglu.h"

#include "cpu/rows/rows-inl.h"

namespace pmf::cpu::PMF_LEVEL {
namespace {

template <typename A>
struct Sigmoid {
  Vec<A> s, c;  // sigmoid(g), 1 - sigmoid(g) = sigmoid(-g)
};

template <typename A>
PMF_INLINE Sigmoid<A> sigmoid(Vec<A> g) {
  constexpr A kLog2e = static_cast<A>(1.44269504088896340736);
  const Vec<A> e = exp2((g < 0 ? g : -g) * kLog2e);  // exp(-|g|), in [0, 1]
  const Vec<A> large = 1 / (1 + e), small = e * large;
  return {g < 0 ? small : large, g < 0 ? large : small};
}

// silu'(g) = s (1 + g (1 - s))
template <typename A>
PMF_INLINE Vec<A> slope(Vec<A> g, const Sigmoid<A>& f) {
  return fma(g * f.c, f.s, f.s);
}

// silu''(g) = s (1 - s) (2 + g ((1 - s) - s))
template <typename A>
PMF_INLINE Vec<A> curvature(Vec<A> g, const Sigmoid<A>& f) {
  return f.s * f.c * (2 + g * (f.c - f.s));
}

template <typename T>
void forward(const SwigluParams& p, const ParallelFor& parallel) {
  for_rows(p.shape, parallel, [&](const Cursor& row) {
    const T *gate = row.at<T>(p.gate), *up = row.at<T>(p.up);
    T* y = row.at<T>(p.y);
    for_vectors<T>(p.shape.width, [&](int64_t i, auto part, int) PMF_ALWAYS {
      const Vec<Acc<T>> g = get(gate + i, part);
      put(y + i, g * sigmoid<Acc<T>>(g).s * get(up + i, part), part);
    });
  });
}

template <typename T>
void forward_jvp(const SwigluParams& p, const ParallelFor& parallel) {
  using A = Acc<T>;
  for_rows(p.shape, parallel, [&](const Cursor& row) {
    const T *gate = row.at<T>(p.gate), *up = row.at<T>(p.up);
    const T *gate_t = row.at<T>(p.gate_t), *up_t = row.at<T>(p.up_t);
    T *y = row.at<T>(p.y), *y_t = row.at<T>(p.y_t);
    for_vectors<T>(p.shape.width, [&](int64_t i, auto part, int) PMF_ALWAYS {
      const Vec<A> g = get(gate + i, part), u = get(up + i, part);
      const Sigmoid<A> f = sigmoid<A>(g);
      const Vec<A> silu = g * f.s;
      put(y + i, silu * u, part);
      const Vec<A> through_gate = slope<A>(g, f) * get(gate_t + i, part) * u;
      put(y_t + i, fma(silu, get(up_t + i, part), through_gate), part);
    });
  });
}

template <typename T>
void backward(const SwigluBackwardParams& p, const ParallelFor& parallel) {
  using A = Acc<T>;
  for_rows(p.shape, parallel, [&](const Cursor& row) {
    const T *gate = row.at<T>(p.gate), *up = row.at<T>(p.up), *grad = row.at<T>(p.grad);
    T *grad_gate = row.at<T>(p.grad_gate), *grad_up = row.at<T>(p.grad_up);
    for_vectors<T>(p.shape.width, [&](int64_t i, auto part, int) PMF_ALWAYS {
      const Vec<A> g = get(gate + i, part), y = get(grad + i, part);
      const Sigmoid<A> f = sigmoid<A>(g);
      put(grad_up + i, g * f.s * y, part);
      put(grad_gate + i, slope<A>(g, f) * get(up + i, part) * y, part);
    });
  });
}

template <typename T>
void backward_jvp(const SwigluBackwardParams& p, const ParallelFor& parallel) {
  using A = Acc<T>;
  for_rows(p.shape, parallel, [&](const Cursor& row) {
    const T *gate = row.at<T>(p.gate), *up = row.at<T>(p.up);
    const T *gate_t = row.at<T>(p.gate_t), *up_t = row.at<T>(p.up_t);
    const T *grad = row.at<T>(p.grad), *grad_t = row.at<T>(p.grad_t);
    T *grad_gate = row.at<T>(p.grad_gate), *grad_up = row.at<T>(p.grad_up);
    T *grad_gate_t = row.at<T>(p.grad_gate_t), *grad_up_t = row.at<T>(p.grad_up_t);
    for_vectors<T>(p.shape.width, [&](int64_t i, auto part, int) PMF_ALWAYS {
      const Vec<A> g = get(gate + i, part), u = get(up + i, part);
      const Vec<A> tg = get(gate_t + i, part), tu = get(up_t + i, part);
      const Vec<A> y = get(grad + i, part), t = get(grad_t + i, part);
      const Sigmoid<A> f = sigmoid<A>(g);
      const Vec<A> silu = g * f.s, d = slope<A>(g, f), d2 = curvature<A>(g, f);
      put(grad_up_t + i, silu * t, part);
      put(grad_gate_t + i, d * u * t, part);
      put(grad_up + i, fma(silu, y, d * tg * t), part);
      put(grad_gate + i, fma(d * u, y, fma(d2 * tg, u, d * tu) * t), part);
    });
  });
}

}  // namespace

void swiglu(const SwigluParams& params, const ParallelFor& parallel) {
  with_type(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    params.gate_t.data == nullptr ? forward<T>(params, parallel) : forward_jvp<T>(params, parallel);
  });
}

void swiglu_backward(const SwigluBackwardParams& params, const ParallelFor& parallel) {
  with_type(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    params.grad_t.data == nullptr ? backward<T>(params, parallel)
                                  : backward_jvp<T>(params, parallel);
  });
}

}  // namespace pmf::cpu::PMF_LEVEL

PMF_DISPATCH(void, swiglu, (const SwigluParams& params, const ParallelFor& parallel),
             (params, parallel))
PMF_DISPATCH(void, swiglu_backward,
             (const SwigluBackwardParams& params, const ParallelFor& parallel), (params, parallel))
