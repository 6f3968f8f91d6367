// The kernel of attention's forward, and the table of one dtype: what is compiled, for which
// widths.
#pragma once

#include "cuda/attention/attention_forward.cuh"

namespace pmf::cuda {

template <class C>
__global__ void __launch_bounds__(C::kWarps* kWarpThreads)
    attention_forward_kernel(const AttentionParams params, const ForwardPlan plan) {
  using T = typename C::T;
  const AttentionShape& shape = params.shape;
  const int queries = int(shape.queries), all_keys = int(shape.keys);
  const int width = int(shape.width), value_width = int(shape.value_width);
  const int thread = threadIdx.x, warp = thread / kWarpThreads, lane = thread % kWarpThreads;

  // Neighbouring blocks share a head, so that its tiles come from L2.
  unsigned index = blockIdx.x;
  const unsigned parts = unsigned((value_width + C::kOut - 1) / C::kOut);
  const int column = int(index % parts) * C::kOut;
  index /= parts;
  const int rows = C::kUnit * plan.warps * plan.passes;  // of the block
  const int first = int(index % unsigned(plan.row_blocks)) * rows;
  index /= unsigned(plan.row_blocks);
  const int head = int(index % unsigned(shape.heads)), batch = int(index / unsigned(shape.heads));
  const int key_head = head / int(shape.heads / shape.key_heads);

  // Shared: the parameters, each warp's queries and their tangents (if they are kept there), the
  // ring. Pointers and strides are read from the parameters in shared memory where they are needed:
  // no compiler can move such reads out of the loops, where they would take dozens of registers.
  AttentionParams& p = *reinterpret_cast<AttentionParams*>(dynamic_shared());
  T* const own = reinterpret_cast<T*>(dynamic_shared() + kForwardParamsBytes) +
                 warp * C::kSides * C::kQueryElements;
  T* const ring = reinterpret_cast<T*>(dynamic_shared() + kForwardParamsBytes) +
                  plan.warps * C::kSides * C::kQueryElements;
  if (thread == 0) p = params;
  __syncthreads();

  const int seen = params.is_causal && first + rows < all_keys ? first + rows : all_keys;
  const int tiles = (seen + C::kKeys - 1) / C::kKeys;
  const auto issue = [&](int i) {
    T* const slot = ring + i % plan.slots * C::kSlotElements;
    const auto copy = [&](auto tile, const ConstView4& view, int skipped, int columns) {
      const HeadView<T> from = head_of<T>(view, batch, key_head);
      if (from.data == nullptr) return;
      load_rows(tile, C::kKeys, from.data + skipped * from.column_stride, from.row_stride,
                from.column_stride, i * C::kKeys, all_keys, columns, thread, int(blockDim.x));
    };
    T* const values = slot + C::kSides * C::kKeyElements;
    copy(typename C::KeyTile{slot}, p.key, 0, width);
    if constexpr (C::kTangent) {
      copy(typename C::KeyTile{slot + C::kKeyElements}, p.key_t, 0, width);
    }
    copy(typename C::ValueTile{values}, p.value, column, value_width - column);
    if constexpr (C::kTangent) {
      copy(typename C::ValueTile{values + C::kValueElements}, p.value_t, column,
           value_width - column);
    }
  };

  // The sign of the scale goes into the queries, exactly, so that the largest raw score is the
  // largest score.
  const uint32_t sign = params.scale >= 0 ? 0u : sizeof(T) == 2 ? 0x80008000u : 0x80000000u;
  const float scale = fabsf(float(params.scale)), factor = scale * kLog2eFloat;
  ForwardUnit<C> unit;
  const auto load_unit = [&](int query) {
    const HeadView<T> view = head_of<T>(p.query, batch, head);
    unit.q.load(own, view, query, queries, width, sign, lane);
    if constexpr (C::kTangent) {
      // An absent tangent is read as no rows at all: zeros.
      const bool present = p.query_t.data != nullptr;
      unit.qt.load(own + C::kQueryElements, present ? head_of<T>(p.query_t, batch, head) : view,
                   query, present ? queries : 0, width, sign, lane);
    }
  };

  // Tiles on their way ahead of the one at work; all of them if units follow one another.
  const bool whole_head = plan.slots >= tiles;
  const int ahead = whole_head ? tiles : plan.slots - 1;
  if (!C::kKeepsQueries) load_unit(first + warp * C::kUnit);
  for (int i = 0; i < ahead; ++i) {
    issue(i);
    cp_async_commit();
  }
  const auto arrive = [&](int i) {
    if (ahead > 0) wait_all_but(whole_head ? tiles - 1 - i : ahead - 1);
    __syncthreads();  // tile i is there, if it was on its way, and everyone is done with tile i - 1
    if (whole_head) return;
    if (i + ahead < tiles) issue(i + ahead);
    cp_async_commit();
    if (ahead > 0) return;
    cp_async_wait<0>();
    __syncthreads();
  };

  for (int pass = 0; pass < plan.passes; ++pass) {
    const int query = first + (pass * plan.warps + warp) * C::kUnit;
    const bool active = query < queries;
    if (C::kKeepsQueries) {
      load_unit(query);
    } else if (pass > 0) {
      __syncwarp();
      load_unit(query);
      cp_async_commit();
      cp_async_wait<0>();
      __syncwarp();
    }
    unit.reset();
    ScorePlace place = {batch, head, query + (lane >> 2), 0};
    for (int i = 0; i < tiles; ++i) {
      if (pass == 0) arrive(i);
      const int key = i * C::kKeys;
      if (!active || (params.is_causal && key >= query + C::kUnit)) continue;
      place.key = key + 2 * (lane & 3);
      const bool edge =
          key + C::kKeys > all_keys || (params.is_causal && key + C::kKeys - 1 > query);
      unit.add_tile(p, ring + i % plan.slots * C::kSlotElements, place, edge, factor, scale, column,
                    lane);
    }
    if (active) unit.finish(p, place, column, lane);
  }
  cp_async_wait<0>();
}

// ---- tables -------------------------------------------------------------------------------------

template <class C>
constexpr ForwardKernel forward_kernel() {
  return {C::kWidth,
          C::kOut,
          C::kKeys,
          C::kUnit,
          int(sizeof(typename C::T)),
          C::kSides,
          !C::kKeepsQueries,
          C::kWarps,
          attention_forward_kernel<C>};
}

// 16-bit types: 64 and 80 tuned. Key tiles are the same with and without tangents, so that out is
// bitwise the same.
template <typename T>
ForwardTable forward_table16() {
  using E = Arithmetic16<T>;
  static const ForwardKernel plain[] = {
      forward_kernel<ForwardSizes<E, 64, 64, 32, 2, false, true, 8>>(),
      forward_kernel<ForwardSizes<E, 80, 80, 32, 2, false, true, 8>>(),
      forward_kernel<ForwardSizes<E, 128, 128, 32, 2, false, false, 8>>(),
      forward_kernel<ForwardSizes<E, 256, 128, 16, 1, false, false, 8>>()};
  static const ForwardKernel tangent[] = {
      forward_kernel<ForwardSizes<E, 64, 64, 32, 1, true, true, 8>>(),
      forward_kernel<ForwardSizes<E, 80, 80, 32, 1, true, true, 8>>(),
      forward_kernel<ForwardSizes<E, 128, 128, 32, 1, true, false, 8>>(),
      forward_kernel<ForwardSizes<E, 256, 64, 16, 1, true, false, 8>>()};
  return {plain, tangent};
}

template <typename E>
ForwardTable forward_table32() {
  static const ForwardKernel plain[] = {
      forward_kernel<ForwardSizes<E, 128, 64, 16, 1, false, false, 8>>(),
      forward_kernel<ForwardSizes<E, 256, 64, 16, 1, false, false, 8>>()};
  static const ForwardKernel tangent[] = {
      forward_kernel<ForwardSizes<E, 128, 64, 16, 1, true, false, 8>>(),
      forward_kernel<ForwardSizes<E, 256, 64, 16, 1, true, false, 8>>()};
  return {plain, tangent};
}

}  // namespace pmf::cuda
