// silu(gate) up on the CPU. The mathematics is in pmf/swiglu.h.
//
// Reads every operand once, row by row. In units of one [rows, W] tensor, the forward moves 3, its
// tangent 3 more, the backward 5 or 10. An element costs one exponential (a polynomial), one
// division and a few multiplications, hidden by memory traffic in fp32. Rounded once, at the store.
#include "pmf/swiglu.h"

#include "cpu/rows/rows-inl.h"

namespace pmf::cpu::PMF_LEVEL {
namespace {

template <typename V>
struct Sigmoid {
  V s, c;  // sigmoid(g), 1 - sigmoid(g) = sigmoid(-g)
};

template <typename A>
PMF_INLINE Sigmoid<Vec<A>> sigmoid_of(Vec<A> g) {
  constexpr A kLog2e = static_cast<A>(1.44269504088896340736);
  const Vec<A> e = exp2((g < 0 ? g : -g) * kLog2e);  // exp(-|g|), in [0, 1]
  const Vec<A> large = 1 / (1 + e), small = e * large;
  return {g < 0 ? small : large, g < 0 ? large : small};
}
PMF_INLINE Sigmoid<Vec<float>> sigmoid(Vec<float> g) { return sigmoid_of<float>(g); }
PMF_INLINE Sigmoid<Vec<double>> sigmoid(Vec<double> g) { return sigmoid_of<double>(g); }
template <typename A>
PMF_INLINE Sigmoid<Pairs<A>> sigmoid(Pairs<A> g) {
  const auto even = sigmoid(g.even), odd = sigmoid(g.odd);
  return {{even.s, odd.s}, {even.c, odd.c}};
}

// silu'(g) = s (1 + g (1 - s))
template <typename V>
PMF_INLINE V slope(V g, const Sigmoid<V>& f) {
  return fma(g * f.c, f.s, f.s);
}

// silu''(g) = s (1 - s) (2 + g ((1 - s) - s))
template <typename V>
PMF_INLINE V curvature(V g, const Sigmoid<V>& f) {
  const V product = f.s * f.c;
  return fma(product * g, f.c - f.s, product + product);
}

template <typename T, typename L = Fastest<T>>
void forward(const SwigluParams& p, const ParallelFor& parallel) {
  for_rows(p.shape, parallel, [&](const Cursor& row) {
    const T *gate = row.at<T>(p.gate), *up = row.at<T>(p.up);
    T* y = row.at<T>(p.y);
    for_vectors<L>(p.shape.width, [&](int64_t i, auto part, int) PMF_ALWAYS {
      const auto g = get<L>(gate + i, part);
      put(y + i, g * sigmoid(g).s * get<L>(up + i, part), part);
    });
  });
}

template <typename T, typename L = Fastest<T>>
void forward_jvp(const SwigluParams& p, const ParallelFor& parallel) {
  for_rows(p.shape, parallel, [&](const Cursor& row) {
    const T *gate = row.at<T>(p.gate), *up = row.at<T>(p.up);
    const T *gate_t = row.at<T>(p.gate_t), *up_t = row.at<T>(p.up_t);
    T *y = row.at<T>(p.y), *y_t = row.at<T>(p.y_t);
    for_vectors<L>(p.shape.width, [&](int64_t i, auto part, int) PMF_ALWAYS {
      fetch_to_write<L>(y + i + kAhead<T>);
      fetch_to_write<L>(y_t + i + kAhead<T>);
      const auto g = get<L>(gate + i, part), u = get<L>(up + i, part);
      const auto f = sigmoid(g);
      const auto silu = g * f.s;
      put(y + i, silu * u, part);
      const auto through_gate = slope(g, f) * get<L>(gate_t + i, part) * u;
      put(y_t + i, fma(silu, get<L>(up_t + i, part), through_gate), part);
    });
  });
}

template <typename T, typename L = Fastest<T>>
void backward(const SwigluBackwardParams& p, const ParallelFor& parallel) {
  for_rows(p.shape, parallel, [&](const Cursor& row) {
    const T *gate = row.at<T>(p.gate), *up = row.at<T>(p.up), *grad = row.at<T>(p.grad);
    T *grad_gate = row.at<T>(p.grad_gate), *grad_up = row.at<T>(p.grad_up);
    for_vectors<L>(p.shape.width, [&](int64_t i, auto part, int) PMF_ALWAYS {
      fetch_to_write<L>(grad_up + i + kAhead<T>);
      fetch_to_write<L>(grad_gate + i + kAhead<T>);
      const auto g = get<L>(gate + i, part), y = get<L>(grad + i, part);
      const auto f = sigmoid(g);
      put(grad_up + i, g * f.s * y, part);
      put(grad_gate + i, slope(g, f) * get<L>(up + i, part) * y, part);
    });
  });
}

template <typename T, typename L = Fastest<T>>
void backward_jvp(const SwigluBackwardParams& p, const ParallelFor& parallel) {
  for_rows(p.shape, parallel, [&](const Cursor& row) {
    const T *gate = row.at<T>(p.gate), *up = row.at<T>(p.up);
    const T *gate_t = row.at<T>(p.gate_t), *up_t = row.at<T>(p.up_t);
    const T *grad = row.at<T>(p.grad), *grad_t = row.at<T>(p.grad_t);
    T *grad_gate = row.at<T>(p.grad_gate), *grad_up = row.at<T>(p.grad_up);
    T *grad_gate_t = row.at<T>(p.grad_gate_t), *grad_up_t = row.at<T>(p.grad_up_t);
    for_vectors<L>(p.shape.width, [&](int64_t i, auto part, int) PMF_ALWAYS {
      fetch_to_write<L>(grad_up_t + i + kAhead<T>);
      fetch_to_write<L>(grad_gate_t + i + kAhead<T>);
      fetch_to_write<L>(grad_up + i + kAhead<T>);
      fetch_to_write<L>(grad_gate + i + kAhead<T>);
      const auto g = get<L>(gate + i, part), u = get<L>(up + i, part);
      const auto tg = get<L>(gate_t + i, part), tu = get<L>(up_t + i, part);
      const auto y = get<L>(grad + i, part), t = get<L>(grad_t + i, part);
      const auto f = sigmoid(g);
      const auto silu = g * f.s, d = slope(g, f), d2 = curvature(g, f);
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

PMF_DISPATCH(params.dtype, void, swiglu, (const SwigluParams& params, const ParallelFor& parallel),
             (params, parallel))
PMF_DISPATCH(params.dtype, void, swiglu_backward,
             (const SwigluBackwardParams& params, const ParallelFor& parallel), (params, parallel))
