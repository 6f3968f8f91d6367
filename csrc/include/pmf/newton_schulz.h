// Newton-Schulz orthogonalisation of many matrices of any shapes, alone or in a Muon step. CUDA
// only: on the CPU, csrc/ops calls torch's GEMM.
//
//   X = G / |G|_F;  every step  X <- a X + (b A + c A^2) X,  A = X X^T   (a tall G is transposed)
//
// In a Muon step, G comes from the momentum and the result updates the parameter:
//   m <- m + (1 - mu) (g - m);  G = of_momentum m + of_gradient g;  p <- (1 - lr wd) p - lr scale X
#pragma once

#include "pmf/optimizer.h"

namespace pmf {

struct NewtonSchulzMatrix {
  const void* source = nullptr;  // [rows, columns] dtype, contiguous: G, or Muon's gradient g
  void* target = nullptr;  // [rows, columns] dtype, contiguous: the result, or Muon's parameter p
  float* momentum = nullptr;  // [rows, columns] contiguous; Muon only
  float* master = nullptr;    // [rows, columns] contiguous; Muon only, for a 16-bit parameter
  int64_t rows = 0, columns = 0;
  double scale = 1;  // Muon only
};

enum class NewtonSchulzMethod : int32_t { automatic = 0, direct = 1, gram = 2 };

struct NewtonSchulzParams {
  DType dtype = DType::f32;    // of sources and targets: f32, bf16, f16
  DType compute = DType::f16;  // of operands and stored results: f16, bf16, f32
  bool allow_tf32 = false;     // f32 operands may be rounded to TF32; otherwise f32 accuracy
  NewtonSchulzMethod method = NewtonSchulzMethod::automatic;
  const NewtonSchulzMatrix* matrices = nullptr;  // none of them empty
  int64_t count = 0;
  const double* coefficients = nullptr;  // [steps, 3]: a, b, c
  int64_t steps = 0;                     // at least 1
  const StepParams* muon = nullptr;      // null: the result itself is written
  void* workspace = nullptr;  // newton_schulz_workspace_bytes() of device memory, 16-byte aligned
};

// ---- form, and number of steps between restarts --------------------------------------------

// n >= kGramRatio m: iterating on the Gram matrix is cheaper.
constexpr double kGramRatio = 1.5;

inline bool takes_gram_form(NewtonSchulzMethod method, int64_t rows, int64_t columns) {
  const auto m = static_cast<double>(rows < columns ? rows : columns),
             n = static_cast<double>(rows < columns ? columns : rows);
  return method == NewtonSchulzMethod::gram ||
         (method == NewtonSchulzMethod::automatic && n >= kGramRatio * m);
}

// The number of steps in the Gram form's segment that begins at step `begin`; a segment of one is a
// direct step.
//
// If R = X X^T has an error of at most u, the unit roundoff of the stored type, a segment's
// polynomial q yields singular values of at most sqrt(max (r + u) q(r)^2), r in [-u, |X|^2 + u]:
// those of X below sqrt(u), which R does not resolve, grow by G, the product of the steps' a, and
// add up to u G^2 to the square of the largest. Up to 0.1, the singular values stay where the
// following steps converge (for the quintic up to 1.264, 5 % above its largest value); after the
// last step none follow, so 1 is allowed. A segment has at most two steps because accuracy suffers
// from three, except that three final steps form one segment, because they cost less than a
// restart.
inline int64_t segment_steps(const double* coefficients, int64_t steps, int64_t begin,
                             DType compute, bool allow_tf32) {
  const double u = compute == DType::bf16                 ? 0x1p-9
                   : compute == DType::f64                ? 0x1p-53
                   : compute == DType::f32 && !allow_tf32 ? 0x1p-24
                                                          : 0x1p-11;
  const int64_t left = steps - begin;
  for (int64_t length = begin > 0 && left == 3 ? 3 : 2; length > 1; --length) {
    if (length > left) continue;
    double growth = u;
    for (int64_t step = begin; step < begin + length; ++step) {
      growth *= coefficients[3 * step] * coefficients[3 * step];
    }
    if (growth <= (length == left ? 1 : 0.1)) return length;
  }
  return 1;
}

}  // namespace pmf
