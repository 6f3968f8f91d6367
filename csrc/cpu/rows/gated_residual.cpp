// Gated residual on the CPU: y = x + g b. The mathematics is in pmf/gated_residual.h.
//
// One row at a time, every operand read once, directly from and to memory. No computation
// takes as long as moving the bytes: in units of one [rows, W] tensor the forward moves 3, its
// tangent 3 more, the backward 3 or 6, and copy bandwidth is the bound. The gate is one vector that
// stays in cache. Values are rounded once, at the store.
#include "pmf/gated_residual.h"

#include "cpu/rows/rows-inl.h"

namespace pmf::cpu::PMF_LEVEL {
namespace {

template <typename T, typename L = Fastest<T>>
void forward(const GatedResidualParams& p, const ParallelFor& parallel) {
  for_rows(p.shape, parallel, [&](const Cursor& row) {
    const T *x = row.at<T>(p.x), *b = row.at<T>(p.branch), *g = row.at<T>(p.gate);
    T* y = row.at<T>(p.y);
    for_vectors<L>(p.shape.width, [&](int64_t i, auto part, int) PMF_ALWAYS {
      put(y + i, fma(get<L>(g + i, part), get<L>(b + i, part), get<L>(x + i, part)), part);
    });
  });
}

template <typename T, typename L = Fastest<T>>
void forward_jvp(const GatedResidualParams& p, const ParallelFor& parallel) {
  for_rows(p.shape, parallel, [&](const Cursor& row) {
    const T *x = row.at<T>(p.x), *b = row.at<T>(p.branch), *g = row.at<T>(p.gate);
    const T *tx = row.at<T>(p.x_t), *tb = row.at<T>(p.branch_t), *tg = row.at<T>(p.gate_t);
    T *y = row.at<T>(p.y), *ty = row.at<T>(p.y_t);
    for_vectors<L>(p.shape.width, [&](int64_t i, auto part, int) PMF_ALWAYS {
      fetch_to_write<L>(y + i + kAhead<T>);
      fetch_to_write<L>(ty + i + kAhead<T>);
      const auto gate = get<L>(g + i, part), branch = get<L>(b + i, part);
      put(y + i, fma(gate, branch, get<L>(x + i, part)), part);
      const auto tangent = fma(gate, get<L>(tb + i, part), get<L>(tx + i, part));
      put(ty + i, fma(get<L>(tg + i, part), branch, tangent), part);
    });
  });
}

template <typename T, typename L = Fastest<T>>
void backward(const GatedResidualBackwardParams& p, const ParallelFor& parallel) {
  using A = Acc<T>;
  const int64_t rows = p.shape.rows() / max64(1, p.groups), width = p.shape.width;
  const RowSums sums(rows, width);
  auto run = [&](int64_t first, int64_t last, A* dg) {
    Cursor row(p.shape, first);
    for (int64_t r = first; r < last; ++r, row.next()) {
      const T *y = row.at<T>(p.grad), *b = row.at<T>(p.branch), *g = row.at<T>(p.gate);
      T* db = row.at<T>(p.grad_branch);
      for_vectors<L>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
        fetch_to_write<L>(db + i + kAhead<T>);
        const auto grad = get<L>(y + i, part);
        put(db + i, get<L>(g + i, part) * grad, part);
        accumulate(dg + i, get<L>(b + i, part), grad);
      });
    }
  };
  for_runs<A>(sums, p.groups, rows, 1, p.workspace, parallel, run);
  add_runs<L>(sums, p.groups, width, 1, 0, p.workspace, p.grad_gate, parallel);
}

template <typename T, typename L = Fastest<T>>
void backward_jvp(const GatedResidualBackwardParams& p, const ParallelFor& parallel) {
  using A = Acc<T>;
  const int64_t rows = p.shape.rows() / max64(1, p.groups), width = p.shape.width;
  const RowSums sums(rows, width);
  auto run = [&](int64_t first, int64_t last, A* dg) {
    A* dtg = dg + sums.pitch;
    Cursor row(p.shape, first);
    for (int64_t r = first; r < last; ++r, row.next()) {
      const T *y = row.at<T>(p.grad), *t = row.at<T>(p.grad_t);
      const T *b = row.at<T>(p.branch), *tb = row.at<T>(p.branch_t);
      const T *g = row.at<T>(p.gate), *tg = row.at<T>(p.gate_t);
      T *db = row.at<T>(p.grad_branch), *dtb = row.at<T>(p.grad_branch_t);
      for_vectors<L>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
        fetch_to_write<L>(db + i + kAhead<T>);
        fetch_to_write<L>(dtb + i + kAhead<T>);
        const auto grad = get<L>(y + i, part), grad_t = get<L>(t + i, part);
        const auto gate = get<L>(g + i, part), branch = get<L>(b + i, part);
        put(db + i, fma(gate, grad, get<L>(tg + i, part) * grad_t), part);
        put(dtb + i, gate * grad_t, part);
        accumulate(dg + i, branch, grad);
        accumulate(dg + i, get<L>(tb + i, part), grad_t);
        accumulate(dtg + i, branch, grad_t);
      });
    }
  };
  for_runs<A>(sums, p.groups, rows, 2, p.workspace, parallel, run);
  add_runs<L>(sums, p.groups, width, 2, 0, p.workspace, p.grad_gate, parallel);
  add_runs<L>(sums, p.groups, width, 2, 1, p.workspace, p.grad_gate_t, parallel);
}

}  // namespace

void gated_residual(const GatedResidualParams& params, const ParallelFor& parallel) {
  with_type(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    params.x_t.data == nullptr ? forward<T>(params, parallel) : forward_jvp<T>(params, parallel);
  });
}

void gated_residual_backward(const GatedResidualBackwardParams& params,
                             const ParallelFor& parallel) {
  with_type(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    params.grad_t.data == nullptr ? backward<T>(params, parallel)
                                  : backward_jvp<T>(params, parallel);
  });
}

}  // namespace pmf::cpu::PMF_LEVEL

PMF_DISPATCH(params.dtype, void, gated_residual,
             (const GatedResidualParams& params, const ParallelFor& parallel), (params, parallel))
PMF_DISPATCH(params.dtype, void, gated_residual_backward,
             (const GatedResidualBackwardParams& params, const ParallelFor& parallel),
             (params, parallel))
