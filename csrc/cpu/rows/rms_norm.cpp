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
  for_rows(p.shape, parallel, [&](const Cursor& row) {
    norm_row(p.shape.width, p.eps, NoTurn{}, row.at<T>(p.x), w, row.at<T>(p.y));
  });
}

template <typename T, typename L = Fastest<T>>
void forward_jvp(const RmsNormParams& p, const ParallelFor& parallel) {
  const Row<L> w(static_cast<const T*>(p.weight)), tw(static_cast<const T*>(p.weight_t));
  const bool moving = moves(tw.data, p.shape.width);
  for_rows(p.shape, parallel, [&](const Cursor& row) {
    norm_row_jvp(p.shape.width, p.eps, NoTurn{}, row.at<T>(p.x), row.at<T>(p.x_t), w, tw, moving,
                 row.at<T>(p.y), row.at<T>(p.y_t));
  });
}

template <typename T, typename L = Fastest<T>>
void backward(const RmsNormBackwardParams& p, const ParallelFor& parallel) {
  const Row<L> w(static_cast<const T*>(p.weight));
  const int64_t rows = p.shape.rows(), width = p.shape.width;
  const RowSums sums(rows, width);
  auto run = [&](int64_t first, int64_t last, Acc<T>* dw) {
    Cursor row(p.shape, first);
    for (int64_t r = first; r < last; ++r, row.next()) {
      norm_row_backward(width, p.eps, NoTurn{}, row.at<T>(p.grad), row.at<T>(p.x), w,
                        row.at<T>(p.grad_x), dw);
    }
  };
  for_runs<Acc<T>>(sums, 1, rows, 1, p.workspace, parallel, run);
  add_runs<L>(sums, 1, width, 1, 0, p.workspace, p.grad_weight, parallel);
}

template <typename T, typename L = Fastest<T>>
void backward_jvp(const RmsNormBackwardParams& p, const ParallelFor& parallel) {
  const Row<L> w(static_cast<const T*>(p.weight)), tw(static_cast<const T*>(p.weight_t));
  const int64_t rows = p.shape.rows(), width = p.shape.width;
  const RowSums sums(rows, width);
  auto run = [&](int64_t first, int64_t last, Acc<T>* dw) {
    Cursor row(p.shape, first);
    for (int64_t r = first; r < last; ++r, row.next()) {
      norm_row_jvp_backward(width, p.eps, NoTurn{}, row.at<T>(p.grad), row.at<T>(p.grad_t),
                            row.at<T>(p.x), row.at<T>(p.x_t), w, tw, row.at<T>(p.grad_x),
                            row.at<T>(p.grad_x_t), dw, dw + sums.pitch);
    }
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

PMF_DISPATCH(void, rms_norm, (const RmsNormParams& params, const ParallelFor& parallel),
             (params, parallel))
PMF_DISPATCH(void, rms_norm_backward,
             (const RmsNormBackwardParams& params, const ParallelFor& parallel), (params, parallel))
