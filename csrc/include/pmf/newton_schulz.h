// Newton-Schulz orthogonalisation of many matrices of any shapes, alone or as a step of Muon. CUDA
// only: on the CPU the work is torch's GEMM, called from csrc/ops.
//
//   X = G / |G|_F;  every step  X <- a X + (b A + c A^2) X,  A = X X^T   (a tall G is transposed)
//
// As a step of Muon, G is the momentum's update and the result moves the parameter:
//   m <- m + (1 - mu) (g - m);  G = of_momentum m + of_gradient g;  p <- (1 - lr wd) p - lr scale X
#pragma once

#include "pmf/optimizer.h"

namespace pmf {

struct NewtonSchulzMatrix {
  const void* source = nullptr;  // [rows, columns] dtype, contiguous: G, or Muon's gradient g
  void* target = nullptr;  // [rows, columns] dtype, contiguous: the result, or Muon's parameter p
  float* momentum = nullptr;  // [rows, columns] contiguous; Muon's only
  float* master = nullptr;    // [rows, columns] contiguous; Muon's only, of a 16-bit parameter
  int64_t rows = 0, columns = 0;
  double scale = 1;  // Muon's only
};

enum class NewtonSchulzMethod : int32_t { automatic = 0, direct = 1, gram = 2 };

struct NewtonSchulzParams {
  DType dtype = DType::f32;    // of sources and targets: f32, bf16, f16
  DType compute = DType::f16;  // of the operands and what is stored: f16, bf16, f32
  bool allow_tf32 = false;  // f32 operands may be rounded to TF32; else products are exact to f32
  NewtonSchulzMethod method = NewtonSchulzMethod::automatic;
  const NewtonSchulzMatrix* matrices = nullptr;  // none empty
  int64_t count = 0;
  const double* coefficients = nullptr;  // [steps, 3]: a, b, c
  int64_t steps = 0;                     // at least 1
  const StepParams* muon = nullptr;      // null: the result itself is written
  void* workspace = nullptr;  // newton_schulz_workspace_bytes() of device memory, 16-byte aligned
};

}  // namespace pmf
