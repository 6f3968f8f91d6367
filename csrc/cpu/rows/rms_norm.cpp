// RMSNorm on the CPU. The mathematics is in pmf/rms_norm.h, the per-row computation in norm-inl.h.
//
// In units of one [rows, W] tensor, the forward moves 2, its tangent 2 more, the backward 3 or 6;
// copy bandwidth is the bound. The weight's gradient sums runs of rows into fp32 vectors that stay
// in the L1 cache, then the runs in order (RowSums): bitwise the same for any number of threads.
#include "pmf/rms_norm.h"

#include "cpu/rows/norm-inl.h"

namespace pmf::cpu::PMF_LEVEL {
namespace {

template <typename T, typename L = Fastest<T>>
void forward(const RmsNormParams& p, const ParallelFor& parallel) {
  const Row<L> w(static_cast<const T*>(p.weight));
  const int64_t width = p.shape.width;
  for_stretches(p.shape, parallel, [&](const Cursor& row, int64_t count) PMF_ALWAYS {
    const auto x = row.stretch<T>(p.x);
    const auto y = row.stretch<T>(p.y);
    run_norm(Norm<L, int64_t, NoTurn>{width, p.eps, w, {}, x, y}, count);
  });
}

template <typename T, typename L = Fastest<T>>
void forward_jvp(const RmsNormParams& p, const ParallelFor& parallel) {
  const Row<L> w(static_cast<const T*>(p.weight)), tw(static_cast<const T*>(p.weight_t));
  const int64_t width = p.shape.width;
  const bool moving = moves(tw.data, width);
  for_stretches(p.shape, parallel, [&](const Cursor& row, int64_t count) PMF_ALWAYS {
    const auto x = row.stretch<T>(p.x), tx = row.stretch<T>(p.x_t);
    const auto y = row.stretch<T>(p.y), ty = row.stretch<T>(p.y_t);
    run_norm(NormJvp<L, int64_t, NoTurn>{width, p.eps, w, tw, moving, {}, x, tx, y, ty}, count);
  });
}

template <typename T, typename L = Fastest<T>>
void backward(const RmsNormBackwardParams& p, const ParallelFor& parallel) {
  const Row<L> w(static_cast<const T*>(p.weight));
  const int64_t rows = p.shape.rows(), width = p.shape.width;
  const RowSums sums(rows, width);
  const auto run = [&](int64_t first, int64_t last, Acc<T>* dw) {
    const auto stretch = [&](const Cursor& row, int64_t count) PMF_ALWAYS {
      const auto grad = row.stretch<T>(p.grad), x = row.stretch<T>(p.x);
      const auto dx = row.stretch<T>(p.grad_x);
      run_norm(NormBackward<L, int64_t, NoTurn>{width, p.eps, w, {}, grad, x, dx, dw}, count);
    };
    for_stretches(Cursor(p.shape, first), first, last, stretch);
  };
  for_runs<Acc<T>>(sums, 1, rows, 1, p.workspace, parallel, run);
  add_runs<L>(sums, 1, width, 1, 0, p.workspace, p.grad_weight, parallel);
}

template <typename T, typename L = Fastest<T>>
void backward_jvp(const RmsNormBackwardParams& p, const ParallelFor& parallel) {
  const Row<L> w(static_cast<const T*>(p.weight)), tw(static_cast<const T*>(p.weight_t));
  const int64_t rows = p.shape.rows(), width = p.shape.width;
  const RowSums sums(rows, width);
  const auto run = [&](int64_t first, int64_t last, Acc<T>* dw) {
    Acc<T>* dtw = dw + sums.pitch;
    const auto stretch = [&](const Cursor& row, int64_t count) PMF_ALWAYS {
      const auto grad = row.stretch<T>(p.grad), grad_t = row.stretch<T>(p.grad_t);
      const auto x = row.stretch<T>(p.x), tx = row.stretch<T>(p.x_t);
      const auto dx = row.stretch<T>(p.grad_x), dtx = row.stretch<T>(p.grad_x_t);
      run_norm(
          NormJvpBackward<L, int64_t, NoTurn>{
              width, p.eps, w, tw, {}, grad, grad_t, x, tx, dx, dtx, dw, dtw},
          count);
    };
    for_stretches(Cursor(p.shape, first), first, last, stretch);
  };
  for_runs<Acc<T>>(sums, 1, rows, 2, p.workspace, parallel, run);
  add_runs<L>(sums, 1, width, 2, 0, p.workspace, p.grad_weight, parallel);
  add_runs<L>(sums, 1, width, 2, 1, p.workspace, p.grad_weight_t, parallel);
}

}  // namespace

void rms_norm(const RmsNormParams& params, const ParallelFor& parallel) {
  with_type(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    params.x_t.data == nullptr ? forward<T>(params, parallel) : forward_jvp<T>(params, parallel);
  });
}

void rms_norm_backward(const RmsNormBackwardParams& params, const ParallelFor& parallel) {
  with_type(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    params.grad_t.data == nullptr ? backward<T>(params, parallel)
                                  : backward_jvp<T>(params, parallel);
  });
}

}  // namespace pmf::cpu::PMF_LEVEL

PMF_DISPATCH(params.dtype, void, rms_norm,
             (const RmsNormParams& params, const ParallelFor& parallel), (params, parallel))
PMF_DISPATCH(params.dtype, void, rms_norm_backward,
             (const RmsNormBackwardParams& params, const ParallelFor& parallel), (params, parallel))
