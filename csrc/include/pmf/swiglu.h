// y = silu(gate) up, silu(g) = g s, s = sigmoid(g), with tangents and gradients.
//
//   d  = silu'(g)  = s (1 + g (1 - s))          d2 = silu''(g) = s (1 - s) (2 + g (1 - 2 s))
//   forward:    y = g s u                       ty = d tg u + g s tu
//   backward:   dg = d u Y + (d2 tg u + d tu) T    dtg = d u T
//               du = g s Y + d tg T                dtu = g s T     (Y, T: gradients of y and ty)
// s and 1 - s both come from e = exp(-|g|), as 1 / (1 + e) and e / (1 + e): neither cancels.
//
// Bytes, in units of one [rows, W] tensor: forward 3, with tangent 6; backward 5, through both 10.
#pragma once

#include "pmf/rows.h"

namespace pmf {

struct SwigluParams {
  DType dtype = DType::f32;  // dtype of every tensor here
  RowShape shape;
  ConstRows gate, up;      // [rows, W]
  Rows y;                  // [rows, W]
  ConstRows gate_t, up_t;  // [rows, W]; null: value only
  Rows y_t;                // [rows, W], with gate_t
};

struct SwigluBackwardParams {
  DType dtype = DType::f32;
  RowShape shape;
  ConstRows grad, grad_t;  // [rows, W] gradients of y and y_t; grad_t null: value only
  ConstRows gate, up, gate_t, up_t;
  Rows grad_gate, grad_up, grad_gate_t, grad_up_t;  // the last two with grad_t
};

namespace cpu {
void swiglu(const SwigluParams& params, const ParallelFor& parallel);
void swiglu_backward(const SwigluBackwardParams& params, const ParallelFor& parallel);
}  // namespace cpu

}  // namespace pmf
