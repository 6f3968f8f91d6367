// y = w x / sqrt(mean x^2 + eps), with tangents and gradients. Means are over a row of W elements.
//
//   s = rsqrt(mean x^2 + eps)   n = s x   g = s tx   a = mean(n g)
//   forward:    y = w n            ty = w tn + tw n        tn = g - a n
//   backward (Y, T: gradients of y and ty):
//     u = w T    v = w Y + tw T    b = mean(u n)    c = mean(u g)    d = mean(v n)
//     dx = s (v - a u - b g + (3 a b - c - d) n)       dw  = sum over rows (n Y + tn T)
//     dtx = s (u - b n)                                dtw = sum over rows n T
//   and without a tangent dx = s (w Y - mean(w Y n) n), dw = sum n Y.
//
// Bytes, in units of one [rows, W] tensor: forward 2, with tangent 4; backward 3, through both 6.
#pragma once

#include "pmf/rows.h"

namespace pmf {

struct RmsNormParams {
  DType dtype = DType::f32;  // dtype of every tensor here
  RowShape shape;
  double eps = 1e-6;
  ConstRows x;                     // [rows, W]
  const void* weight = nullptr;    // [W]
  Rows y;                          // [rows, W]
  ConstRows x_t;                   // [rows, W]; null: value only
  const void* weight_t = nullptr;  // [W] with x_t; zeros if the weight has no tangent
  Rows y_t;                        // [rows, W], with x_t
};

struct RmsNormBackwardParams {
  DType dtype = DType::f32;
  RowShape shape;
  double eps = 1e-6;
  ConstRows grad, grad_t;  // [rows, W] gradients of y and y_t; grad_t null: value only
  ConstRows x, x_t;        // [rows, W]
  const void* weight = nullptr;
  const void* weight_t = nullptr;
  Rows grad_x, grad_x_t;          // [rows, W]; the second with grad_t
  void* grad_weight = nullptr;    // [W]
  void* grad_weight_t = nullptr;  // [W], with grad_t
  void* workspace = nullptr;      // rms_norm_workspace_bytes() bytes, 64-aligned
};

inline int64_t rms_norm_workspace_bytes(const RmsNormBackwardParams& p, bool gpu) {
  const int64_t rows = p.shape.rows(), width = p.shape.width;
  const RowSums sums = gpu ? RowSums::on_gpu(1, rows, width) : RowSums(rows, width);
  const int64_t vectors = sums.runs * (p.grad_t.data == nullptr ? 1 : 2);
  return vectors * sums.pitch * (p.dtype == DType::f64 ? 8 : 4);
}

namespace cpu {
void rms_norm(const RmsNormParams& params, const ParallelFor& parallel);
void rms_norm_backward(const RmsNormBackwardParams& params, const ParallelFor& parallel);
}  // namespace cpu

}  // namespace pmf
