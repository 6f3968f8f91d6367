// Blocks of the Hopper attention backward: the parameters of a launch, shared memory, the copying
// warps, and what a consumer does with the ring whatever it computes. hopper_backward.cuh and
// hopper_backward_tangents.cuh have the consumers, and describe both.
#pragma once

#include "cuda/attention/attention_backward_queries.cuh"
#include "cuda/attention/hopper_tile.cuh"
#include "cuda/common/divisor.h"

namespace pmf::cuda {

constexpr int kBackwardSides = 2;

// The parameters of any launch. The sides of queries are Q and G and, with tangents, tQ and X;
// those of keys K, V, tK, tV (QuerySide and KeySide).
template <int kSides>
struct HopperBackwardOf {
  HopperMaps row[kSides], column[kSides];
  View4 gradient[kSides];  // of Q; or of V and K: see consume()
  float* statistics;       // attention_backward.cuh: [batch, heads, statistic, padded_queries]
  const float *lse, *grad_lse, *grad_lse_t;  // [batch, heads, queries]; the gradients may be null
  int heads, rows, columns;                  // rows and columns (the streamed side) per head
  int tiles, row_blocks, rounds, items;      // as in HopperForward
  int padded_queries;
  Divisor by_parts, by_heads;
  float factor, scale;
};
using HopperBackward = HopperBackwardOf<kBackwardSides>;

template <typename T, int kWidth, int kColumns_, int kSlots_, bool kByKeys_,
          int kSides = kBackwardSides>
struct HopperBackwardSizes : HopperShape<T, kWidth, kColumns_, kSides> {
  using Base = HopperShape<T, kWidth, kColumns_, kSides>;
  using Launch = HopperBackwardOf<kSides>;
  static constexpr int kColumns = kColumns_, kSlots = kSlots_, kConsumers = 2;
  static constexpr int kRowStatistics = kStatistics<(kSides > kBackwardSides)>;
  static constexpr bool kByKeys = kByKeys_;
  static constexpr uint32_t kRowsBytes = Base::Rows::kBytes, kSlotBytes = Base::Tile::kBytes;
  static constexpr uint32_t kStatisticBytes = kByKeys ? kRowStatistics * kColumns * 4 : 0;
  // Shared memory: the rows of each consumer, the ring, the statistics of each slot, the barriers.
  static constexpr uint32_t kRing = kConsumers * kRowsBytes;
  static constexpr uint32_t kFigures = kRing + kSlots * kSlotBytes;
  static constexpr uint32_t kBarriers = kFigures + kSlots * kStatisticBytes;
  static constexpr int kSharedBytes = int(kBarriers) + 8 * (2 * kSlots + 2 * kConsumers);
};

// Addresses in shared memory.
template <class C>
struct HopperBackwardPlaces {
  uint32_t base;

  __device__ uint32_t rows(int consumer) const { return base + uint32_t(consumer) * C::kRowsBytes; }
  __device__ uint32_t tile(int slot) const {
    return base + C::kRing + uint32_t(slot) * C::kSlotBytes;
  }
  __device__ static float* statistics(int slot) {
    return reinterpret_cast<float*>(swizzled_shared() + C::kFigures) +
           slot * int(C::kStatisticBytes / 4);
  }

  __device__ uint32_t full(int slot) const { return barrier(slot); }
  __device__ uint32_t empty(int slot) const { return barrier(C::kSlots + slot); }
  __device__ uint32_t rows_full(int c) const { return barrier(2 * C::kSlots + c); }
  __device__ uint32_t rows_empty(int c) const { return barrier(2 * C::kSlots + C::kConsumers + c); }

 private:
  __device__ uint32_t barrier(int i) const { return base + C::kBarriers + 8 * uint32_t(i); }
};

// ---- the copying warps --------------------------------------------------------------------------

template <class C>
__device__ inline void copy_tiles(const typename C::Launch& p, const HopperBackwardPlaces<C>& at) {
  RingPlace<C::kSlots> place;
  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x)) {
    const HopperItem here = hopper_item<C>(p, item);
    for (int j = 0; j < p.tiles; ++j, place = place.next()) {
      mbarrier_wait(at.empty(place.slot), place.parity ^ 1);
      copy_rows<C, typename C::Tile>(at.tile(place.slot), p.column, at.full(place.slot),
                                     j * C::kColumns, here.head, here.batch);
    }
  }
}

template <class C>
__device__ inline void copy_row_blocks(const typename C::Launch& p,
                                       const HopperBackwardPlaces<C>& at, int c) {
  uint32_t parity = 0;
  int i = 0;
  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x), ++i) {
    const HopperItem here = hopper_item<C>(p, item);
    const HopperShare share = hopper_share<C>(p, here, c, i);
    for (int r = 0; r < share.count; ++r, parity ^= 1) {
      const int row = (here.first + share.turn + r * C::kConsumers) * kRowBlock;
      mbarrier_wait(at.rows_empty(c), parity ^ 1);
      copy_rows<C, typename C::Rows>(at.rows(c), p.row, at.rows_full(c), row, here.head,
                                     here.batch);
    }
  }
}

// The statistics of all queries of a head, p.padded_queries apart.
template <class C>
__device__ inline float* statistics_of(const typename C::Launch& p, const HopperItem& here) {
  const int64_t head = int64_t(here.batch) * p.heads + here.head;
  return p.statistics + head * C::kRowStatistics * p.padded_queries;
}

// Called by a whole warp. Entries past the last query are zero; any finite number would do, as
// their rows of Q and G are zero.
template <class C>
__device__ inline void copy_statistics(const typename C::Launch& p,
                                       const HopperBackwardPlaces<C>& at) {
  constexpr int kFloats = kChunkBytes / 4, kCopies = C::kColumns / kFloats;  // of one statistic
  const int lane = int(threadIdx.x) % kWarpThreads;
  RingPlace<C::kSlots> place;
  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x)) {
    const float* const from = statistics_of<C>(p, hopper_item<C>(p, item));
    for (int j = 0; j < p.tiles; ++j, place = place.next()) {
      mbarrier_wait(at.empty(place.slot), place.parity ^ 1);
      float* const to = at.statistics(place.slot);
      for (int i = lane; i < C::kRowStatistics * kCopies; i += kWarpThreads) {
        const int query = j * C::kColumns + i % kCopies * kFloats;
        cp_async_16(to + i * kFloats, from + (int64_t{i / kCopies} * p.padded_queries + query),
                    query < p.columns);
      }
      cp_async_commit();
      cp_async_wait<0>();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(at.full(place.slot));
    }
  }
}

// ---- the consumers ------------------------------------------------------------------------------

// Releases an item's tiles, of which a consumer without row blocks needs none.
template <class C>
__device__ inline void skip_tiles(const typename C::Launch& p, const HopperBackwardPlaces<C>& at,
                                  RingPlace<C::kSlots>& place, int lane) {
  for (int j = 0; j < p.tiles; ++j, place = place.next()) {
    mbarrier_wait(at.full(place.slot), place.parity);
    if (lane == 0) mbarrier_arrive(at.empty(place.slot));
  }
}

// Stores a row block's gradient after its last tile.
template <class T, int kOutTiles>
__device__ inline void store_gradient(const float (&sums)[kOutTiles][4], const View4& view,
                                      const HopperItem& here, int row, int rows, int lane) {
  T* const start = static_cast<T*>(view.data) + int64_t(here.batch) * view.stride[0] +
                   int64_t(here.head) * view.stride[1];
  store_rows<true>(sums, start, view.stride[2], 1, row, rows, 8 * kOutTiles, lane);
}

// ---- the block ----------------------------------------------------------------------------------

// What each warp of a block does; consume(at, c) is what those of consumer c do.
template <class C, class Consume>
__device__ inline void hopper_backward_block(const typename C::Launch& p, const Consume& consume) {
  const HopperBackwardPlaces<C> at = {shared_address(swizzled_shared())};
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < C::kSlots; ++slot) {
      mbarrier_init(at.full(slot), C::kByKeys ? 2 : 1);
      mbarrier_init(at.empty(slot), C::kConsumers * kGroupWarps);
    }
    for (int c = 0; c < C::kConsumers; ++c) {
      mbarrier_init(at.rows_full(c), 1);
      mbarrier_init(at.rows_empty(c), kGroupWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  // Uniform across the warp, and the shuffle lets the compiler know.
  const int warp = shuffle_idx(int(threadIdx.x) / kWarpThreads, 0);
  if (warp < 4) {
    registers_down_to<24>();
    if (C::kByKeys && warp == 3) copy_statistics<C>(p, at);
    if (warp <= C::kConsumers && elect_one()) {
      warp == 0 ? copy_tiles<C>(p, at) : copy_row_blocks<C>(p, at, warp - 1);
    }
  } else {
    registers_up_to<240>();
    consume(at, warp / 4 - 1);
  }
}

}  // namespace pmf::cuda
