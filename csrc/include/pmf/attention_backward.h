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
// in full precision: the forward only has to keep lse, not out, out_t or lse_t.
#pragma once

#include "pmf/attention.h"

namespace pmf {

struct AttentionBackwardParams {
  AttentionShape shape;
  DType dtype = DType::f32;  // dtype of everything except lse and the mask
  double scale = 1.0;        // c, as given to the forward
  AttentionWindow window;
  AttentionSequences sequences;
  bool allow_tf32 = false;  // fp32 on CUDA: products may round their factors to TF32
  AttentionMask mask;

  ConstView4 query;  // [B, H,  Nq, D ] dtype
  ConstView4 key;    // [B, Hk, Nk, D ] dtype
  ConstView4 value;  // [B, Hk, Nk, Dv] dtype

  // Tangents, each shaped like its primal; null means zero, at no cost. Read only with grad_t.
  ConstView4 query_t, key_t, value_t;

  ConstView4 grad;    // [B, H, Nq, Dv] dtype; null means zero (not both null)
  ConstView4 grad_t;  // [B, H, Nq, Dv] dtype; null: the ordinary backward

  // From the forward: contiguous [B, H, Nq], fp32 (fp64 for fp64). Any value near the row's maximum
  // would do, as it only sets the exponential's range. -inf: the row attends to nothing.
  const void* lse = nullptr;
  // Gradients of lse and lse_t, with the layout of lse; null means zero. grad_lse_t is read only
  // with grad_t.
  const void *grad_lse = nullptr, *grad_lse_t = nullptr;
  int64_t lse_stride = 0;  // stride of a head in these three, in elements; 0: Nq

  View4 grad_query;  // [B, H,  Nq, D ] dtype
  View4 grad_key;    // [B, Hk, Nk, D ] dtype, summed over the query heads of a group
  View4 grad_value;  // [B, Hk, Nk, Dv] dtype, likewise

  // Written only with grad_t; null: not requested, and its product is skipped.
  View4 grad_query_t, grad_key_t, grad_value_t;

  // attention_backward_workspace_bytes() bytes (cpu or cuda), 64-byte aligned, with arbitrary
  // contents.
  void* workspace = nullptr;
};

namespace cpu {

// Scratch memory for `threads` workers: linear in Nk, independent of Nq.
int64_t attention_backward_workspace_bytes(const AttentionBackwardParams& params, int64_t threads);

// Computes all gradients in one pass over the heads, on parallel.threads workers, the number that
// the workspace was sized for. Bitwise deterministic for a given number of threads; no atomics on
// data.
void attention_backward(const AttentionBackwardParams& params, const ParallelFor& parallel);

}  // namespace cpu

namespace cuda {

// Query statistics that one kernel passes to the next, fp32 [B, H, statistic, rows], with rows for
// the queries of every sequence and for the overhang of its last block. The rows of sequence s,
// whose first query is q, begin at q / 16 * 16 + s kBackwardOverhang.
constexpr int64_t kBackwardMostRows = 96;  // most query rows per block
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
