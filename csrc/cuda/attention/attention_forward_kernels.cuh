// The kernel of attention's forward, and a dtype's table of instantiations: which widths are
// compiled.
#pragma once

#include "cuda/attention/attention_forward.cuh"

namespace pmf::cuda {

enum ForwardTensor { kKey, kKeyT, kValue, kValueT, kForwardTensors };

// What a block re-reads for every tile. It precedes the tiles in shared memory: no compiler keeps
// it in registers throughout the loop, where the accumulators need them all.
template <class C>
struct ForwardPlace {
  std::conditional_t<C::kRegular, WholeHead, HeadView<typename C::T>> streamed[kForwardTensors];
  Sequence sequence;
  int batch, head, column, first;
  uint32_t found[16];  // one element per warp: see attention_hidden.cuh
};

template <class C>
__global__ void __launch_bounds__(C::kWarps* kWarpThreads, 1)
    attention_forward_kernel(const __grid_constant__ AttentionParams p,
                             const __grid_constant__ ForwardPlan plan) {
  using T = typename C::T;
  const AttentionShape& shape = p.shape;
  const int width = C::kRegular ? C::kWidth : int(shape.width);
  const int value_width = C::kRegular ? C::kOut : int(shape.value_width);
  const int thread = threadIdx.x, warp = thread / kWarpThreads, lane = thread % kWarpThreads;

  // Neighbouring blocks share a head, so its key and value tiles hit in L2.
  uint32_t index = blockIdx.x;
  const int column = C::kRegular ? 0 : int(plan.by_parts.divide(index)) * C::kOut;
  const int rows = C::kUnit * int(blockDim.x) / kWarpThreads;  // per block
  int block = int(plan.by_row_blocks.divide(index));
  const Sequence sequence = sequence_of<false>(p.sequences, shape, rows, block);
  const int first = block * rows, queries = sequence.queries;
  if (first >= queries) return;
  const int head = int(plan.by_heads.divide(index)), batch = int(index);
  uint32_t key_head = uint32_t(head);
  plan.by_group.divide(key_head);

  // Shared memory layout: ForwardPlace, each warp's queries and their tangents, the ring buffer.
  static_assert(sizeof(ForwardPlace<C>) <= kForwardPlaceBytes, "the plan counts them");
  ForwardPlace<C>& place = *reinterpret_cast<ForwardPlace<C>*>(dynamic_shared());
  T* const tiles = reinterpret_cast<T*>(dynamic_shared() + kForwardPlaceBytes);
  T* const own = tiles + warp * C::kSides * C::kUnitElements;
  T* const ring = tiles + int(blockDim.x) / kWarpThreads * C::kSides * C::kUnitElements;
  if (thread == 0) {
    place.sequence = sequence;
    place.batch = batch, place.head = head, place.column = column, place.first = first;
  }
  if (thread < kForwardTensors) {
    const ConstView4& view = thread == kKey     ? p.key
                             : thread == kKeyT  ? p.key_t
                             : thread == kValue ? p.value
                                                : p.value_t;
    place.streamed[thread] =
        streamed_head<C::kRegular, T>(view, batch, int(key_head), sequence.key);
  }

  const int query = first + warp * C::kUnit;
  const bool active = query < queries;
  // Regular kernels for wide rows have no register left for the length: their warps re-read it.
  // Those for wide tiles have none left for the scale; elsewhere a register is faster.
  constexpr bool kReads = C::kRegular && C::kWidth > 64;
  const float held = fabsf(float(p.scale));
  const float& scale = C::kKeys > 32 ? plan.scale : held;
  ForwardUnit<C> unit{{{own}, plan.sign}, {{own + C::kUnitElements}, plan.sign}};
  const auto query_view = streamed_head<C::kRegular, T>(p.query, batch, head, sequence.query);
  unit.q.load(query_view, query, queries, width, lane);
  if constexpr (C::kTangent) {
    // An absent tangent loads as zeros: none of its rows count as valid.
    const bool present = C::kRegular || p.query_t.data != nullptr;
    unit.qt.load(present ? streamed_head<C::kRegular, T>(p.query_t, batch, head, sequence.query)
                         : query_view,
                 query, present ? queries : 0, width, lane);
  }

  RowRange seen = {0, sequence.keys};
  if constexpr (!C::kRegular) {
    const int last = (first + rows < queries ? first + rows : queries) - 1;
    seen = rows_in_window(first, last, plan.window.left, plan.window.right, seen.end, C::kKeys);
  }
  const TileStream stream = {(seen.end - seen.begin + C::kKeys - 1) / C::kKeys,
                             C::kRegular ? kForwardRegularSlots : plan.slots};
  const auto issue = [&](int i, int slot) {
    T* const to = ring + slot * C::kSlotElements;
    const int key = seen.begin + i * C::kKeys, all_keys = place.sequence.keys;
    if constexpr (C::kRegular) {
      load_whole_rows<kForwardTensors, C::kTangent ? 1 : 2>(typename C::KeyTile{to}, C::kKeys,
                                                            place.streamed, key, all_keys, thread,
                                                            int(blockDim.x));
    } else {
      const auto copy = [&](auto tile, ForwardTensor which, int skipped, int columns) {
        HeadView<T> from = place.streamed[which];
        if (from.data == nullptr) return;
        from.data += skipped * from.column_stride;
        load_rows(tile, C::kKeys, from, key, all_keys, columns, thread, int(blockDim.x));
      };
      T* const values = to + C::kSides * C::kKeyElements;
      copy(typename C::KeyTile{to}, kKey, 0, width);
      copy(typename C::ValueTile{values}, kValue, place.column, value_width - place.column);
      if constexpr (C::kTangent) {
        copy(typename C::KeyTile{to + C::kKeyElements}, kKeyT, 0, width);
        copy(typename C::ValueTile{values + C::kValueElements}, kValueT, place.column,
             value_width - place.column);
      }
    }
  };
  __syncthreads();  // `place` has been written
  stream.begin(issue);

  unit.reset();

  stream.run(issue, [&](int i, int slot) {
    const int key = seen.begin + i * C::kKeys;
    bool hides = false;
    if (!C::kRegular) {
      const bool has_vt = C::kTangent && p.value_t.data != nullptr;
      const bool may_hide =
          p.mask.kind != MaskKind::none || crosses(plan.window, place.first, rows, key, C::kKeys);
      if (may_hide) {
        hides = any_not_finite(ring + slot * C::kSlotElements + C::kSides * C::kKeyElements,
                               (has_vt ? 2 : 1) * C::kValueElements, place.found, thread,
                               int(blockDim.x));
      }
    }
    if (kReads ? query >= place.sequence.queries : !active) return;
    if (!C::kRegular && outside(plan.window, query, C::kUnit, key, C::kKeys)) return;
    const ScorePlace score = {place.batch, place.head, query + (lane >> 2), key + 2 * (lane & 3)};
    const bool last = i + 1 == stream.count;
    const bool edge = (last && key + C::kKeys > place.sequence.keys) ||
                      (!C::kRegular && crosses(plan.window, query, C::kUnit, key, C::kKeys));
    unit.add_tile(p, plan, place.sequence, ring, slot, score, edge, hides, scale, place.column,
                  lane);
  });
  if (kReads ? query < place.sequence.queries : active) {
    unit.finish(p, place.sequence, place.batch, place.head, query + (lane >> 2), place.column,
                lane);
  }
  cp_async_wait<0>();
}

// ---- tables -------------------------------------------------------------------------------------

template <class C>
constexpr ForwardKernel forward_kernel(int64_t least_shared = 0) {
  return {C::kWidth, C::kOut,   C::kKeys,    C::kUnit,     int(sizeof(typename C::T)),
          C::kSides, C::kWarps, C::kRegular, least_shared, attention_forward_kernel<C>};
}

// 16-bit types: 64, 80 and 128 are tuned. On one device, key tiles of a width are the same size in
// all kernels, which makes `out` bitwise identical with and without tangents, masks and packing.
// Tiles of 48 keys pay off where two blocks with tangents fit on a multiprocessor.
template <typename T>
ForwardTable forward_table16() {
  using E = Arithmetic16<T>;
  constexpr int64_t kTwoBlocks = 200 * 1024;
  static const ForwardKernel plain[] = {
      forward_kernel<ForwardSizes<E, 64, 64, 48, 2, false, 12, true>>(kTwoBlocks),
      forward_kernel<ForwardSizes<E, 64, 64, 32, 2, false, 12, true>>(),
      forward_kernel<ForwardSizes<E, 80, 80, 32, 2, false, 12, true>>(),
      forward_kernel<ForwardSizes<E, 128, 128, 32, 2, false, 8, true>>(),
      forward_kernel<ForwardSizes<E, 64, 64, 48, 2, false, 8, false>>(kTwoBlocks),
      forward_kernel<ForwardSizes<E, 64, 64, 32, 2, false, 8, false>>(),
      forward_kernel<ForwardSizes<E, 128, 128, 32, 2, false, 8, false>>(),
      forward_kernel<ForwardSizes<E, 256, 128, 16, 1, false, 8, false>>()};
  static const ForwardKernel tangent[] = {
      forward_kernel<ForwardSizes<E, 64, 64, 48, 1, true, 12, true>>(kTwoBlocks),
      forward_kernel<ForwardSizes<E, 64, 64, 32, 1, true, 12, true>>(),
      forward_kernel<ForwardSizes<E, 80, 80, 32, 1, true, 12, true>>(),
      forward_kernel<ForwardSizes<E, 128, 128, 32, 1, true, 8, true>>(),
      forward_kernel<ForwardSizes<E, 64, 64, 48, 1, true, 8, false>>(kTwoBlocks),
      forward_kernel<ForwardSizes<E, 64, 64, 32, 1, true, 8, false>>(),
      forward_kernel<ForwardSizes<E, 128, 128, 32, 1, true, 8, false>>(),
      forward_kernel<ForwardSizes<E, 256, 64, 16, 1, true, 8, false>>()};
  return {plain, tangent};
}

template <typename E>
ForwardTable forward_table32() {
  static const ForwardKernel plain[] = {
      forward_kernel<ForwardSizes<E, 128, 64, 16, 1, false, 8, false>>(),
      forward_kernel<ForwardSizes<E, 256, 64, 16, 1, false, 8, false>>()};
  static const ForwardKernel tangent[] = {
      forward_kernel<ForwardSizes<E, 128, 64, 16, 1, true, 8, false>>(),
      forward_kernel<ForwardSizes<E, 256, 64, 16, 1, true, 8, false>>()};
  return {plain, tangent};
}

}  // namespace pmf::cuda
