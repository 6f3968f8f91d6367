// How attention's forward is divided into thread blocks; host code for launches and introspection.
#pragma once

#include "cuda/attention/attention_window.h"
#include "cuda/common/divisor.h"
#include "pmf/attention.h"

namespace pmf::cuda {

constexpr int kForwardPlaceBytes = 256;  // shared memory reserved for ForwardPlace
constexpr int kForwardRegularSlots = 3;  // ring slots in a regular kernel

// The device properties that a plan depends on.
struct DeviceLimits {
  int64_t shared_per_block = 0;      // most bytes a block may request
  int64_t shared_per_processor = 0;  // bytes for all blocks resident on an SM
};

// One launch. A unit is what a warp processes at a time: 16 or 32 queries of one head.
struct ForwardPlan {
  int warps = 0;  // per block
  int slots = 0;  // ring slots, each for one key tile
  int shared_bytes = 0;
  int blocks_per_processor = 0;
  int row_blocks = 0;  // query blocks per head, including surplus ones (packed sequences)
  // Parameters, which instructions read from the constant bank, not from registers: |scale|,
  // |scale| log2 e, and the sign bits of a negative scale's elements. XORed into the queries, which
  // is exact, these make the largest raw score the largest score.
  float scale = 1, factor = 1;
  uint32_t sign = 0;
  Window window;
  // Divisors that decompose a block index into value column block, query block, head and batch, and
  // a head index into the key head.
  Divisor by_parts, by_row_blocks, by_heads, by_group;
  int64_t blocks = 0;  // grid size
};

using ForwardFunction = void (*)(AttentionParams, ForwardPlan);

// A kernel for all tensors whose queries have at most `width` columns.
struct ForwardKernel {
  int width;  // columns of a key tile
  int out;    // value columns per block; wider values take several blocks
  int keys;   // keys per tile
  int unit;   // queries per unit
  int element_bytes;
  int sides;  // 1, or 2 with tangents
  int warps;  // register limit: most warps per block and per SM
  // For regular calls only: no mask, no window, no negative scale, all tangents present, queries
  // and values as wide as the tiles, every row made of aligned 16-byte chunks, row strides below
  // 2^31 bytes.
  bool regular;
  int64_t least_shared;  // bytes of shared memory that a block must be allowed to request
  ForwardFunction function;
};

// Kernels of one dtype, narrowest first, without and with tangents.
struct ForwardTable {
  const ForwardKernel* plain;
  const ForwardKernel* tangent;
};
ForwardTable attention_forward_bf16();
ForwardTable attention_forward_f16();
ForwardTable attention_forward_tf32();
ForwardTable attention_forward_f32();

// The kernel that runs a call, given the shared memory available to a block. Not for fp64.
const ForwardKernel& attention_forward_kernel(const AttentionParams& params,
                                              int64_t shared_per_block);

// A kernel's plan on a device; blocks is 0 if there is nothing to compute.
ForwardPlan attention_forward_plan(const ForwardKernel& kernel, const AttentionParams& params,
                                   const DeviceLimits& limits);

}  // namespace pmf::cuda
