// RMSNorm of every head of queries and keys, then rotary embedding of the last P of the N tokens.
//
//   n = w x rsqrt(mean x^2 + eps)                       over the D of one head and token
//   y[2i]     = n[2i] cos[i] - n[2i + 1] sin[i]         y = R n, R orthogonal,
//   y[2i + 1] = n[2i] sin[i] + n[2i + 1] cos[i]         the identity for the first N - P tokens
// Tangents and gradients are rms_norm's (see rms_norm.h): R applies to ty and y alike, and the
// gradients of both outputs are first rotated back by R^T.
//
// Bytes, in units of query plus key: forward 2, with tangent 4; backward 3, through both 6; the
// tables are small and stay in cache.
#pragma once

#include "pmf/rows.h"

namespace pmf {

// Query or key: [B, heads, N, D] through strides, D contiguous.
struct RotaryHeads {
  int64_t heads = 0;
  ConstView4 x, x_t;               // x_t null: value only
  const void* weight = nullptr;    // [D]
  const void* weight_t = nullptr;  // [D], with x_t
  View4 y, y_t;
};

struct RotaryHeadsBackward {
  int64_t heads = 0;
  ConstView4 grad, grad_t;  // gradients of y and y_t; grad_t null: value only
  ConstView4 x, x_t;
  const void* weight = nullptr;
  const void* weight_t = nullptr;
  View4 grad_x, grad_x_t;
  void* grad_weight = nullptr;    // [D]
  void* grad_weight_t = nullptr;  // [D], with grad_t
};

struct RotaryShape {
  DType dtype = DType::f32;                  // dtype of everything except cos and sin
  int64_t batch = 0, tokens = 0, width = 0;  // B, N, D (even)
  int64_t rotated = 0;                       // P <= N
  double eps = 1e-6;
  const void* cos = nullptr;  // [P, D/2] contiguous, fp32 (fp64 for fp64)
  const void* sin = nullptr;
};

struct RotaryQkNormParams {
  RotaryShape shape;
  RotaryHeads sides[2];  // query, key
};

struct RotaryQkNormBackwardParams {
  RotaryShape shape;
  RotaryHeadsBackward sides[2];
  void* workspace = nullptr;  // rotary_workspace_bytes() bytes, 64-aligned
};

// The CPU processes the sides in turn and reuses the memory; a GPU processes them concurrently.
inline int64_t rotary_workspace_bytes(const RotaryQkNormBackwardParams& p, bool gpu) {
  int64_t largest = 0, all = 0;
  for (const RotaryHeadsBackward& side : p.sides) {
    const int64_t rows = p.shape.batch * side.heads * p.shape.tokens, width = p.shape.width;
    const RowSums sums = gpu ? RowSums::on_gpu(1, rows, width) : RowSums(rows, width);
    const int64_t vectors = sums.runs * (side.grad_t.data == nullptr ? 1 : 2);
    const int64_t bytes = vectors * sums.pitch * (p.shape.dtype == DType::f64 ? 8 : 4);
    if (bytes > largest) largest = bytes;
    all += bytes;
  }
  return gpu ? all : largest;
}

namespace cpu {
void rotary_qk_norm(const RotaryQkNormParams& params, const ParallelFor& parallel);
void rotary_qk_norm_backward(const RotaryQkNormBackwardParams& params, const ParallelFor& parallel);
}  // namespace cpu

}  // namespace pmf
