// silu(gate) up on CUDA: values, tangents and gradients. The mathematics is in pmf/swiglu.h.
//
// Tiling: a thread processes one 16-byte slot of every operand at a time (rows.cuh); contiguous
// operands are treated as one row, so that a width of 2730 costs as much as one of 2736.
//
// Bytes, in units of one [rows, W] tensor: forward 3, with tangents 6; backward 5, through both
// outputs 10. An element costs one exponential and one division, about 20 instructions per 6 or
// more bytes: copy bandwidth is the bound. [256, 276, 2048] in bf16 would take 0.29 ms at 3.0 TB/s,
// 0.58 ms with tangents (estimates; not measured).
//
// Sums are in fp32 and each result is rounded once, at the store.
#include "pmf/swiglu.h"

#include "cuda/rows/rows.cuh"

namespace pmf::cuda {
namespace {

struct Silu {
  float g, s, c;  // gate, sigmoid(g), 1 - sigmoid(g): computed without cancellation

  __device__ explicit Silu(float gate) : g(gate) {
    const float e = expf(-fabsf(g)), large = 1.0f / (1.0f + e), small = e * large;
    s = g < 0 ? small : large;
    c = g < 0 ? large : small;
  }
  __device__ float value() const { return g * s; }
  __device__ float slope() const { return fmaf(g * c, s, s); }
  __device__ float curvature() const { return s * c * fmaf(g, c - s, 2.0f); }
};

template <bool kTangent>
struct Forward {
  SwigluParams p;

  template <class Access>
  __device__ void run(const SlotIo<Access>& io) const {
    constexpr int kWidth = Access::kWidth;
    const auto gate = io.load(p.gate);
    const auto up = io.load(p.up);
    typename Access::Slot gate_t{}, up_t{};
    if constexpr (kTangent) {
      gate_t = io.load(p.gate_t);
      up_t = io.load(p.up_t);
    }
    float y[kWidth], y_t[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const Silu f(gate[k]);
      y[k] = f.value() * up[k];
      if constexpr (kTangent) y_t[k] = fmaf(f.value(), up_t[k], f.slope() * gate_t[k] * up[k]);
    }
    io.store(p.y, y);
    if constexpr (kTangent) io.store(p.y_t, y_t);
  }
};

struct Backward {
  SwigluBackwardParams p;

  template <class Access>
  __device__ void run(const SlotIo<Access>& io) const {
    constexpr int kWidth = Access::kWidth;
    const auto gate = io.load(p.gate);
    const auto up = io.load(p.up);
    const auto grad = io.load(p.grad);
    float dg[kWidth], du[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const Silu f(gate[k]);
      du[k] = f.value() * grad[k];
      dg[k] = f.slope() * up[k] * grad[k];
    }
    io.store(p.grad_gate, dg);
    io.store(p.grad_up, du);
  }
};

struct BackwardThroughBoth {
  SwigluBackwardParams p;

  template <class Access>
  __device__ void run(const SlotIo<Access>& io) const {
    constexpr int kWidth = Access::kWidth;
    const auto gate = io.load(p.gate);
    const auto up = io.load(p.up);
    const auto gate_t = io.load(p.gate_t);
    const auto up_t = io.load(p.up_t);
    const auto grad = io.load(p.grad);
    const auto grad_t = io.load(p.grad_t);
    float dg[kWidth], du[kWidth], dg_t[kWidth], du_t[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const Silu f(gate[k]);
      const float u = up[k], tg = gate_t[k], y = grad[k], t = grad_t[k], d = f.slope();
      du_t[k] = f.value() * t;
      dg_t[k] = d * u * t;
      du[k] = fmaf(f.value(), y, d * tg * t);
      dg[k] = fmaf(d * u, y, fmaf(f.curvature() * tg, u, d * up_t[k]) * t);
    }
    io.store(p.grad_gate, dg);
    io.store(p.grad_up, du);
    io.store(p.grad_gate_t, dg_t);
    io.store(p.grad_up_t, du_t);
  }
};

}  // namespace

const char* swiglu(const SwigluParams& p, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const RowOperands operands{p.gate, p.up, p.y, p.gate_t, p.up_t, p.y_t};
    return p.gate_t.data == nullptr ? for_slots<T>(Forward<false>{p}, p.shape, operands, queue)
                                    : for_slots<T>(Forward<true>{p}, p.shape, operands, queue);
  });
}

const char* swiglu_backward(const SwigluBackwardParams& p, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const RowOperands operands{p.grad, p.grad_t,    p.gate,    p.up,          p.gate_t,
                               p.up_t, p.grad_gate, p.grad_up, p.grad_gate_t, p.grad_up_t};
    return p.grad_t.data == nullptr
               ? for_slots<T>(Backward{p}, p.shape, operands, queue)
               : for_slots<T>(BackwardThroughBoth{p}, p.shape, operands, queue);
  });
}

}  // namespace pmf::cuda
