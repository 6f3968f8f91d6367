// Attention and attention with tangents: the contract of the forward kernels.
//
//   S = c Q K^T + mask       P = softmax(S)       out   = P V
//   tS = c (tQ K^T + Q tK^T) r_i = sum_j P_ij tS_ij
//   out_t = (P o tS) V - r o out + P tV
//   lse_i = log sum_j exp(S_ij)      lse_t = r
//
// Entries hidden from a query (mask false or -inf, window, causality) do not affect it, even if
// they are not finite: such an entry of K, tK, V or tV affects only the rows that see it and their
// gradients. A row that attends to nothing yields zeros and gets no gradient; neither does a
// non-finite row whose incoming gradient is exactly zero, if anything is hidden.
//
// Sizes: B batches, H query heads, Hk key heads (H % Hk == 0; query head h reads key head
// h / (H / Hk)), Nq queries, Nk keys, D the width of queries and keys, Dv the width of values.
#pragma once

#include "pmf/common.h"

namespace pmf {

constexpr int64_t kAttentionMaxWidth = 256;

enum class MaskKind : int32_t {
  none = 0,
  boolean = 1,   // bytes; nonzero means "attend"
  additive = 2,  // floating, added to the scaled scores
};

struct AttentionShape {
  int64_t batch = 0, heads = 0, key_heads = 0;
  int64_t queries = 0, keys = 0;
  int64_t width = 0, value_width = 0;  // 1 .. kAttentionMaxWidth
};

// [B, H, Nq, Nk] through strides; broadcast dimensions have stride 0.
struct AttentionMask {
  MaskKind kind = MaskKind::none;
  DType dtype = DType::f32;  // dtype of an additive mask
  ConstView4 view;
};

inline int64_t mask_element_bytes(const AttentionMask& mask) {
  return mask.kind == MaskKind::boolean ? 1 : dtype_bytes(mask.dtype);
}

// Query i attends to keys i - left to i + right, counted from the top left, unless the mask hides
// them. A side may be negative; right = Nk - Nq is causality aligned at the lower right.
constexpr int64_t kUnbounded = INT64_MAX / 4;
struct AttentionWindow {
  int64_t left = kUnbounded, right = kUnbounded;  // causal: right = 0
  bool hides() const { return left < kUnbounded || right < kUnbounded; }
};

// Packed sequences in one [1, H, T, D] tensor: sequence s has rows offsets[s] to
// offsets[s + 1] of query and of key, and attends only to itself. Windows count from its first row.
// Each array ascends from 0 to the number of rows. Null: B samples of equal length.
struct AttentionSequences {
  int64_t count = 0;
  const int64_t *queries = nullptr, *keys = nullptr;  // [count + 1], readable by the kernel
};

struct AttentionParams {
  AttentionShape shape;
  DType dtype = DType::f32;  // dtype of query, key, value, out and their tangents
  bool allow_tf32 = false;   // fp32 on CUDA: products may round their factors to TF32
  double scale = 1.0;        // c; any finite value
  AttentionWindow window;
  AttentionSequences sequences;
  AttentionMask mask;

  ConstView4 query;  // [B, H,  Nq, D ] dtype
  ConstView4 key;    // [B, Hk, Nk, D ] dtype
  ConstView4 value;  // [B, Hk, Nk, Dv] dtype

  // Tangents, each shaped like its primal; null means zero and costs nothing. Read only if out_t is
  // set.
  ConstView4 query_t, key_t, value_t;

  View4 out;    // [B, H, Nq, Dv] dtype; zero in rows that attend to nothing
  View4 out_t;  // [B, H, Nq, Dv] dtype; null: no tangents

  // Contiguous [B, H, Nq], fp32 (fp64 for fp64): log sum_j exp(S_ij), natural logarithm, -inf if a
  // row attends to nothing. All that the backward needs from the forward (attention_backward.h).
  void* lse = nullptr;
  // The tangent of lse, 0 if a row attends to nothing; null: not requested.
  void* lse_t = nullptr;
  int64_t lse_stride = 0;  // stride of a head in lse and lse_t, in elements; 0: Nq

  // attention_forward_workspace_bytes() bytes, 64-byte aligned, with arbitrary contents.
  void* workspace = nullptr;
};

namespace cpu {

// Scratch memory for `threads` workers: linear in Nk (of the longest sequence), independent of Nq.
int64_t attention_forward_workspace_bytes(const AttentionParams& params, int64_t threads);

// Runs on parallel.threads workers, the number that the workspace was sized for. Bitwise
// deterministic, independently of the number of threads.
void attention_forward(const AttentionParams& params, const ParallelFor& parallel);

}  // namespace cpu
}  // namespace pmf
