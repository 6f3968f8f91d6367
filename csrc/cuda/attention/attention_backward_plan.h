// How attention's backward is cut into blocks: host side, for the launcher and for introspection.
#pragma once

#include "cuda/attention/attention_window.h"
#include "cuda/common/divisor.h"
#include "pmf/attention_backward.h"

namespace pmf::cuda {

constexpr int kBackwardPlaceBytes = 256;  // of a block's shared memory: BlockPlace

constexpr int kBackwardRegularSlots = 3;  // of the ring of a regular kernel

// One of the two launches.
struct BackwardPlan {
  int rows = 0;          // of a block, sixteen a warp
  int slots = 0;         // of the ring of streamed tiles, 1 to 3
  int shared_bytes = 0;  // of a block
  int64_t blocks = 0;    // of the grid
  // Of the softmax; factor is scale log2 e. Here, instructions read them from the constant bank,
  // and no register holds them.
  float scale = 1, factor = 1;
  Window window;
  // Row statistics: [B H][statistic][padded_queries].
  int padded_queries = 0;
  float* statistics = nullptr;
  // By which a block finds its place: columns of the gradients, blocks of rows, heads, heads a key
  // head.
  Divisor by_parts, by_row_blocks, by_heads, by_group;
};

using BackwardKernel = void (*)(AttentionBackwardParams, BackwardPlan);
static_assert(sizeof(AttentionBackwardParams) + sizeof(BackwardPlan) <= 4096,
              "what a kernel's arguments may take");

// The two kernels of a dtype for all tensors up to `width` columns.
struct BackwardKernels {
  int width;        // of shared tiles
  int out_queries;  // columns of a gradient that a block of queries accumulates,
  int out_keys;     // and a block of keys
  int columns;      // keys, then queries, of a streamed tile
  int element_bytes;
  int tensors;     // on each side: 2, or 4 with tangents
  int statistics;  // of a row
  int warps;       // on a multiprocessor, that the registers are cut for
  // For regular calls alone: no mask, no window, no grouped heads, both gradients and all tangents
  // there or none of the tangents, everything as wide as the tiles, every row that is read whole
  // 16-byte chunks on 16-byte addresses, less than 2^31 bytes apart.
  bool regular;
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

// Those that a call runs where blocks may have so much shared memory. Not for fp64.
const BackwardKernels& attention_backward_kernels(const AttentionBackwardParams& params,
                                                  int64_t shared_limit);

// How the queries (or, with `by_keys`, the keys) are cut into blocks of at most `shared_limit`
// bytes.
BackwardPlan attention_backward_plan(const BackwardKernels& kernels,
                                     const AttentionBackwardParams& params, bool by_keys,
                                     int64_t shared_limit);

}  // namespace pmf::cuda
