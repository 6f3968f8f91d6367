// How attention's forward is cut into blocks: host side, for the launcher and for introspection.
#pragma once

#include "cuda/attention/attention_window.h"
#include "cuda/common/divisor.h"
#include "pmf/attention.h"

namespace pmf::cuda {

constexpr int kForwardPlaceBytes = 256;  // of a block's shared memory: ForwardPlace
constexpr int kForwardRegularSlots = 3;  // of the ring of a regular kernel

// What decides a plan besides the problem.
struct DeviceLimits {
  int64_t shared_per_block = 0;      // bytes that a block may ask for
  int64_t shared_per_processor = 0;  // bytes that blocks on one multiprocessor share
};

// One launch. A unit is what a warp does at a time: 16 or 32 queries of one head.
struct ForwardPlan {
  int warps = 0;  // of a block
  int slots = 0;  // tiles of keys in the ring
  int shared_bytes = 0;
  int blocks_per_processor = 0;
  int row_blocks = 0;  // blocks of queries of one head, those left over as well
  // |scale| log2 e: here, as instructions read it from the constant bank, and no register holds it.
  float factor = 1;
  Window window;
  // By which a block finds its place: columns of values, blocks of queries, heads, heads a key
  // head.
  Divisor by_parts, by_row_blocks, by_heads, by_group;
  int64_t blocks = 0;  // of the grid
};

using ForwardFunction = void (*)(AttentionParams, ForwardPlan);
static_assert(sizeof(AttentionParams) + sizeof(ForwardPlan) <= 4096,
              "what a kernel's arguments may take");

// A kernel for all tensors whose queries have up to `width` columns.
struct ForwardKernel {
  int width;  // of tiles of keys
  int out;    // columns of values that a block takes; wider values are several blocks' work
  int keys;   // of a tile
  int unit;   // queries
  int element_bytes;
  int sides;  // 1, or 2 with tangents
  int warps;  // most of a block, and of a multiprocessor: what the registers allow
  // For regular calls alone: no mask, no window, no negative scale, all tangents present, queries
  // and values as wide as the tiles, every row whole 16-byte chunks on 16-byte addresses, less than
  // 2^31 bytes apart.
  bool regular;
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

// The one that a call runs on a device whose blocks may have so much shared memory. Not for fp64.
const ForwardKernel& attention_forward_kernel(const AttentionParams& params,
                                              int64_t shared_per_block);

// The plan of a kernel on a device; blocks is 0 where there is nothing to compute.
ForwardPlan attention_forward_plan(const ForwardKernel& kernel, const AttentionParams& params,
                                   const DeviceLimits& limits);

}  // namespace pmf::cuda
