// How attention's backward is divided into thread blocks; host code for launches and introspection.
#pragma once

#include "cuda/attention/attention_window.h"
#include "cuda/common/divisor.h"
#include "pmf/attention_backward.h"

namespace pmf::cuda {

constexpr int kBackwardPlaceBytes = 256;  // shared memory reserved for BlockPlace

constexpr int kBackwardRegularSlots = 3;  // ring slots in a regular kernel

// The plan of one of the two launches.
struct BackwardPlan {
  int rows = 0;          // rows per block, 16 per warp
  int slots = 0;         // slots in the ring of streamed tiles, 1 to 3
  int shared_bytes = 0;  // per block
  int64_t blocks = 0;    // grid size
  // The softmax scale, and factor = scale log2 e. As parameters they are read from the constant
  // bank by the instructions themselves and take no registers.
  float scale = 1, factor = 1;
  Window window;
  // Row statistics: [B H][statistic][padded_queries].
  int padded_queries = 0;
  float* statistics = nullptr;
  // Divisors that decompose a block index into gradient column block, row block, head and batch,
  // and a head index into the key head.
  Divisor by_parts, by_row_blocks, by_heads, by_group;
};

using BackwardKernel = void (*)(AttentionBackwardParams, BackwardPlan);

// The two kernels of a dtype that handle all tensors of at most `width` columns.
struct BackwardKernels {
  int width;        // columns of shared-memory tiles
  int out_queries;  // gradient columns per block of queries
  int out_keys;     // gradient columns per block of keys
  int columns;      // rows of a streamed tile: keys, then queries
  int element_bytes;
  int tensors;     // tensors on each side: 2, or 4 with tangents
  int statistics;  // statistics per row
  int warps;       // warps per SM that the register limit is set for
  // For regular calls only: no mask, no window, no grouped heads, both gradients and all tangents
  // present or no tangents at all, all widths equal to the tiles', every row read made of aligned
  // 16-byte chunks, row strides below 2^31 bytes.
  bool regular;
  BackwardKernel queries;  // launched first: statistics, grad_query, grad_query_t
  BackwardKernel keys;     // launched second: grad_key, grad_value, grad_key_t, grad_value_t
};

// Kernels of one dtype, narrowest first, for the ordinary backward and for tangents.
struct BackwardTable {
  const BackwardKernels* ordinary;
  const BackwardKernels* tangent;
};
BackwardTable attention_backward_bf16();
BackwardTable attention_backward_f16();
BackwardTable attention_backward_tf32();
BackwardTable attention_backward_f32();

// The kernels that run a call, given the shared memory available to a block. Not for fp64.
const BackwardKernels& attention_backward_kernels(const AttentionBackwardParams& params,
                                                  int64_t shared_limit);

// The division of the queries or, with `by_keys`, the keys into blocks that need at most
// `shared_limit` bytes.
BackwardPlan attention_backward_plan(const BackwardKernels& kernels,
                                     const AttentionBackwardParams& params, bool by_keys,
                                     int64_t shared_limit);

}  // namespace pmf::cuda
