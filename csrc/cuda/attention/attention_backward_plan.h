// How attention's backward is cut into blocks: host side, for the launcher and for introspection.
#pragma once

#include "pmf/attention_backward.h"

namespace pmf::cuda {

constexpr int kBackwardPlaceBytes = 128;  // of a block's shared memory: BlockPlace

// One of the two launches.
struct BackwardPlan {
  int rows = 0;          // of a block, sixteen a warp
  int slots = 0;         // of the ring of streamed tiles, 1 to 3
  int shared_bytes = 0;  // of a block
  int64_t blocks = 0;    // of the grid
  // Row statistics: [B H][statistic][padded_queries].
  int padded_queries = 0;
  float* statistics = nullptr;
};

using BackwardKernel = void (*)(AttentionBackwardParams, BackwardPlan);

// The two kernels of a dtype for all tensors up to `width` columns.
struct BackwardKernels {
  int width;        // of shared tiles
  int out_queries;  // columns of a gradient that a block of queries accumulates,
  int out_keys;     // and a block of keys
  int columns;      // keys, then queries, of a streamed tile
  int element_bytes;
  int tensors;             // on each side: 2, or 4 with tangents
  int statistics;          // of a row
  int blocks;              // on a multiprocessor, that the registers are cut for
  BackwardKernel queries;  // statistics, grad_query, grad_query_t; then
  BackwardKernel keys;     // grad_key, grad_value, grad_key_t, grad_value_t
};

// Kernels of one dtype: ordinary ones and those with tangents, narrowest first.
struct BackwardTable {
  const BackwardKernels* ordinary;
  const BackwardKernels* tangent;
};
BackwardTable attention_backward_bf16();
BackwardTable attention_backward_f16();
BackwardTable attention_backward_tf32();
BackwardTable attention_backward_f32();

// Those that a call runs. Not for fp64.
const BackwardKernels& attention_backward_kernels(const AttentionBackwardParams& params);

// How the queries (or, with `by_keys`, the keys) are cut into blocks of at most `shared_limit`
// bytes.
BackwardPlan attention_backward_plan(const BackwardKernels& kernels,
                                     const AttentionBackwardParams& params, bool by_keys,
                                     int64_t shared_limit);

}  // namespace pmf::cuda
