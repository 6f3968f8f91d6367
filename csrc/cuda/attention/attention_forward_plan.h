// How attention's forward is cut into blocks: host side, for the launcher and for introspection.
#pragma once

#include "pmf/attention.h"

namespace pmf::cuda {

constexpr int kForwardParamsBytes = 512;  // of a block's shared memory: AttentionParams

// What decides a plan besides the problem.
struct DeviceLimits {
  int64_t shared_per_block = 0;      // bytes that a block may ask for
  int64_t shared_per_processor = 0;  // bytes that blocks on one multiprocessor share
  int processors = 0;
};

// One launch. A unit is what a warp does at a time: 16 or 32 queries of one head.
struct ForwardPlan {
  int warps = 0;   // of a block
  int slots = 0;   // tiles of keys in the ring; all of the head's tiles if passes > 1
  int passes = 0;  // units that each warp does, one after the other, over the same tiles
  int shared_bytes = 0;
  int blocks_per_processor = 0;
  int row_blocks = 0;  // blocks of queries of one head
  int64_t blocks = 0;  // of the grid
};

using ForwardFunction = void (*)(AttentionParams, ForwardPlan);

// A kernel for all tensors whose queries have up to `width` columns.
struct ForwardKernel {
  int width;  // of tiles of keys
  int out;    // columns of values that a block takes; wider values are several blocks' work
  int keys;   // of a tile
  int unit;   // queries
  int element_bytes;
  int sides;            // 1, or 2 with tangents
  bool shared_queries;  // queries stay in shared memory, not in registers
  int warps;            // most of a block, and of a multiprocessor: what the registers allow
  ForwardFunction function;
};

// Kernels of one dtype, narrowest first: without and with tangents.
struct ForwardTable {
  const ForwardKernel* plain;
  const ForwardKernel* tangent;
};
ForwardTable attention_forward_bf16();
ForwardTable attention_forward_f16();
ForwardTable attention_forward_tf32();
ForwardTable attention_forward_f32();

// The one that a call runs. Not for fp64.
const ForwardKernel& attention_forward_kernel(const AttentionParams& params);

// The plan of a kernel on a device; blocks is 0 where there is nothing to compute.
ForwardPlan attention_forward_plan(const ForwardKernel& kernel, const AttentionShape& shape,
                                   const DeviceLimits& limits);

}  // namespace pmf::cuda
