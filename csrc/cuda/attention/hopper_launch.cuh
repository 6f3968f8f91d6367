// Shared by the launchers of the Hopper attention kernels: whether a kernel supports a call, tensor
// maps, cutting the work into items, and the launch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/attention/hopper_tile.cuh"
#include "cuda/common/device.h"
#include "cuda/common/dry_run.h"
#include "cuda/common/hopper_device.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/tensor_map.cuh"

namespace pmf::cuda {

// Encodes the maps of a tensor [batch, heads, rows, width] for boxes of `box_rows` rows. The stride
// of a dimension of size 1, which affects no address, is replaced with a row's. False if no tensor
// map can describe the tensor.
inline bool encode_maps(HopperMaps* maps, const ConstView4& view, int64_t batch, int64_t heads,
                        int64_t rows, int64_t width, int box_rows) {
  const int64_t sizes[] = {width, rows, heads, batch};
  uint64_t size[4], stride[3];
  for (int d = 0; d < 4; ++d) size[d] = uint64_t(sizes[d]);
  for (int d = 1; d < 4; ++d) {
    const int64_t bytes = 2 * view.stride[3 - d];
    if (sizes[d] > 1 && bytes <= 0) return false;  // expanded or reversed
    stride[d - 1] = sizes[d] > 1 ? uint64_t(bytes) : 2 * uint64_t(width);
  }
  if (dry_run != nullptr) return true;
  const int64_t tail = width % kPieceColumns;
  return encode_tensor_map(&maps->piece, view.data, size, stride, box_rows, Swizzle::bytes128) &&
         (tail == 0 || encode_tensor_map(&maps->tail, view.data, size, stride, box_rows,
                                         tail == 16 ? Swizzle::bytes32 : Swizzle::bytes64));
}

// The kernel for rows of this width, or null.
template <typename Kernel, int kCount>
const Kernel* kernel_of_width(const Kernel (&kernels)[kCount], int64_t width) {
  for (const Kernel& kernel : kernels) {
    if (kernel.width == width) return &kernel;
  }
  return nullptr;
}

// Whether the device supports blocks with `shared_bytes`, and the problem's size suits them.
inline bool hopper_runs(int shared_bytes, const AttentionShape& s) {
  constexpr int64_t kMostHeads = 1 << 20;
  const int64_t all_heads = s.batch * s.heads;
  return device_is_hopper() && shared_bytes <= device_shared_limit() && s.queries >= 1 &&
         s.keys >= 1 && all_heads >= 1 && all_heads <= kMostHeads;
}

// Sets the items: `parts` per head. False if there are too many.
template <typename Params>
bool set_items(Params& p, const AttentionShape& s, int64_t parts) {
  const int64_t items = s.batch * s.heads * parts;
  if (items > INT32_MAX / 2) return false;  // the loops over items count beyond it
  p.heads = int(s.heads);
  p.items = int(items);
  p.by_parts = Divisor(uint32_t(parts));
  p.by_heads = Divisor(uint32_t(s.heads));
  return true;
}

// Cuts every head's rows into items, which blocks process one at a time against tiles of `tile`
// columns. False if there are too many items.
template <typename Params>
bool cut_into_items(Params& p, const AttentionShape& s, int rows, int columns, int tile, int slots,
                    int consumers) {
  const int64_t all_heads = s.batch * s.heads;
  p.tiles = (columns - 1) / tile + 1;
  p.row_blocks = (rows - 1) / kRowBlock + 1;
  // Tiles that stay in shared memory are read only once, but then one block processes a whole head.
  const bool stay = p.tiles <= slots && all_heads >= 2 * int64_t{std::max(1, device_processors())};
  p.rounds = stay ? (p.row_blocks + consumers - 1) / consumers : 1;
  const int64_t parts = (p.row_blocks - 1) / (consumers * p.rounds) + 1;
  return set_items(p, s, parts);
}

// The same for windows and packed sequences, which have tiles of their own: one row block per
// consumer and item. Among the items are surplus ones of packed sequences.
template <typename Params>
bool cut_into_parts(Params& p, const AttentionShape& s, const AttentionSequences& sequences,
                    int consumers) {
  return set_items(p, s, row_blocks(s.queries, consumers * kRowBlock, sequences));
}

// One persistent block per multiprocessor, or per item.
template <typename Params>
const char* launch_items(void (*kernel)(Params), const Params& p, int tile, int consumers,
                         int shared_bytes, void* stream) {
  plan_next_launch(consumers * kRowBlock, tile, 1);
  const int blocks = std::min(p.items, std::max(1, device_processors()));
  return error_sentence(launch(kernel, dim3(unsigned(blocks)),
                               dim3(unsigned((1 + consumers) * kGroupThreads)), shared_bytes,
                               static_cast<cudaStream_t>(stream), p));
}

}  // namespace pmf::cuda
