// Attention's gradients: the contract of the backward kernels.
//
// With S, P, tS and r as in attention.h, G = grad (of out) and X = grad_t (of out_t):
//
//   A_ij = X_i . V_j               a_i = sum_j P_ij A_ij
//   B_ij = G_i . V_j + X_i . tV_j  D_i = sum_j P_ij (B_ij + (tS_ij - r_i) A_ij)
//   dtS = P o (A - a)              dS  = P o (B - D + (tS - r) o (A - a))
//
//   grad_query = c (dS K + dtS tK)               grad_query_t = c dtS K
//   grad_key   = c (dS^T Q + dtS^T tQ)           grad_key_t   = c dtS^T Q
//   grad_value = P^T G + (P o (tS - r))^T X      grad_value_t = P^T X
//
// A gradient g of lse is added to dS as P o g, a gradient y of lse_t to dtS as P o y and to dS as
// P o (tS - r) o y.
//
// Without X this is the ordinary backward. The kernel recomputes a, D, r and the normalisation of P
// itself, in full precision: out, out_t and row_t need not be kept for it, only lse.
#pragma once

#include "pmf/attention.h"

namespace pmf {

struct AttentionBackwardParams {
  AttentionShape shape;
  DType dtype = DType::f32;  // of everything but lse and the mask
  double scale = 1.0;        // c, as given to the forward
  AttentionWindow window;
  AttentionSequences sequences;
  bool allow_tf32 = false;  // fp32 on CUDA: products may round their factors to TF32
  AttentionMask mask;

  ConstView4 query;  // [B, H,  Nq, D ] dtype
  ConstView4 key;    // [B, Hk, Nk, D ] dtype
  ConstView4 value;  // [B, Hk, Nk, Dv] dtype

  // Tangents, each shaped as its primal; null means zero at no cost. Read only with grad_t.
  ConstView4 query_t, key_t, value_t;

  ConstView4 grad;    // [B, H, Nq, Dv] dtype; null means zero (not both null)
  ConstView4 grad_t;  // [B, H, Nq, Dv] dtype; null: the ordinary backward

  // The forward's, contiguous [B, H, Nq], fp32 (fp64 for fp64). Any value near the row's maximum
  // would do: it only sets the exponential's range. -inf: the row attends to nothing.
  const void* lse = nullptr;
  // Gradients of lse and lse_t, laid out like it; null means zero, and the second is read only with
  // grad_t.
  const void *grad_lse = nullptr, *grad_lse_t = nullptr;
  int64_t lse_stride = 0;  // elements of these from one head to the next; 0: Nq

  View4 grad_query;  // [B, H,  Nq, D ] dtype
  View4 grad_key;    // [B, Hk, Nk, D ] dtype, summed over the query heads of a group
  View4 grad_value;  // [B, Hk, Nk, Dv] dtype, likewise

  // Written only with grad_t; null: not wanted, and its product is skipped.
  View4 grad_query_t, grad_key_t, grad_value_t;

  // attention_backward_workspace_bytes() bytes of the namespace, aligned to 64; contents
  // arbitrary.
  void* workspace = nullptr;
};

namespace cpu {

// Scratch memory for `threads` workers: linear in Nk, independent of Nq.
int64_t attention_backward_workspace_bytes(const AttentionBackwardParams& params, int64_t threads);

// Every gradient in one pass over the heads. Runs on parallel.threads workers (the number the
// workspace was sized for). Bitwise deterministic for a given number of threads; no atomics on
// data.
void attention_backward(const AttentionBackwardParams& params, const ParallelFor& parallel);

}  // namespace cpu

namespace cuda {

// Query statistics that one kernel passes to the next, [B, H, statistic, rows]: fp32, with rows for
// the queries of every sequence and for the overhang of their last block. Those of sequence s,
// whose first query is q, begin at q / 16 * 16 + s kBackwardOverhang.
constexpr int64_t kBackwardMostRows = 96;  // of a block
constexpr int64_t kBackwardOverhang = kBackwardMostRows + 16;
constexpr int64_t kBackwardStatistics = 3, kBackwardStatisticsWithTangents = 5;

inline int64_t attention_backward_padded_queries(const AttentionBackwardParams& params) {
  const int64_t sequences = params.sequences.queries == nullptr ? 1 : params.sequences.count;
  return params.shape.queries / 16 * 16 + sequences * kBackwardOverhang;
}

inline int64_t attention_backward_workspace_bytes(const AttentionBackwardParams& params) {
  const int64_t statistics =
      params.grad_t.data != nullptr ? kBackwardStatisticsWithTangents : kBackwardStatistics;
  return params.shape.batch * params.shape.heads * statistics *
         attention_backward_padded_queries(params) * 4;
}

}  // namespace cuda
}  // namespace pmf
