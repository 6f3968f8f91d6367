// y = x + gate branch, with tangents and gradients.
//
//   forward:    y = x + g b                ty = tx + g tb + tg b
//   backward:   db = g Y + tg T            dtb = g T
//               dg = sum (b Y + tb T)      dtg = sum b T         (Y, T: gradients of y and ty)
// The gradients of x and tx are Y and T themselves, so no kernel writes them. The gate is one
// vector per group of consecutive rows: groups = 1 for a gate [W], the number of rows for a full
// gate. Its gradient sums over the rows of each group, in fp32 (fp64 for fp64) and a fixed order.
//
// Bytes, in units of one [rows, W] tensor: forward 3, with tangent 6; backward 3, through both 6.
#pragma once

#include "pmf/rows.h"

namespace pmf {

struct GatedResidualParams {
  DType dtype = DType::f32;  // dtype of every tensor here
  RowShape shape;
  ConstRows x, branch, gate;        // [rows, W]; a gate [W] has zero strides
  Rows y;                           // [rows, W]
  ConstRows x_t, branch_t, gate_t;  // [rows, W]; x_t null: value only
  Rows y_t;                         // [rows, W], with x_t
};

struct GatedResidualBackwardParams {
  DType dtype = DType::f32;
  RowShape shape;
  int64_t groups = 1;      // divides the number of rows
  ConstRows grad, grad_t;  // [rows, W] gradients of y and y_t; grad_t null: value only
  ConstRows branch, gate;  // [rows, W] as in the forward
  ConstRows branch_t, gate_t;
  Rows grad_branch, grad_branch_t;  // [rows, W]; the second with grad_t
  void* grad_gate = nullptr;        // [groups, W]
  void* grad_gate_t = nullptr;      // [groups, W], with grad_t
  void* workspace = nullptr;        // gated_residual_workspace_bytes() bytes, 64-aligned
};

inline RowSums gate_sums(const GatedResidualBackwardParams& p, bool gpu) {
  const int64_t rows = p.groups == 0 ? 0 : p.shape.rows() / p.groups;
  return gpu ? RowSums::on_gpu(p.groups, rows, p.shape.width) : RowSums(rows, p.shape.width);
}

inline int64_t gated_residual_workspace_bytes(const GatedResidualBackwardParams& p, bool gpu) {
  const RowSums sums = gate_sums(p, gpu);
  const int64_t vectors = p.groups * sums.runs * (p.grad_t.data == nullptr ? 1 : 2);
  return vectors * sums.pitch * (p.dtype == DType::f64 ? 8 : 4);
}

namespace cpu {
void gated_residual(const GatedResidualParams& params, const ParallelFor& parallel);
void gated_residual_backward(const GatedResidualBackwardParams& params,
                             const ParallelFor& parallel);
}  // namespace cpu

}  // namespace pmf
