// Attention forward with Hopper instructions (hopper.cuh), with and without tangents: the
// mathematics of attention_forward.cuh, including its online softmax and pivot.
//
// Blocks are persistent. A block has three warpgroups, or four without tangents. One of them gives
// up its registers and copies: one warp copies keys and values with their tangents, tile by tile,
// into a ring; one warp per consumer copies its queries. The other warpgroups, the consumers,
// process 64 queries each, a row block, against tiles of kKeys keys; their S and tS, P and H, O and
// tO stay in registers:
//
//   S(j + 1), tS(j + 1) = products         queued before P(j) V(j), so that the tensor cores
//   O, tO += P(j) V(j) ...                 compute while softmax(j + 1) runs
//
// Each of a tile's three score products accumulates into exactly S or tS, and each of its three
// value products into O or tO: if accumulators overlapped without being equal, ptxas would wait for
// every product separately.
//
// An item of work is a head and `rounds` row blocks per consumer. If all tiles of a head fit in the
// ring, they stay there until its last row block is done (276 keys are three tiles); the consumers
// that get one row block fewer rotate from item to item. Otherwise a consumer takes one row block.
//
// Each warp arrives once it has waited for its own products, so a slot is empty after four arrivals
// per consumer.
//
// Windows and packed sequences have kernels of their own: see hopper_forward_limits.cuh.
#pragma once

#include "cuda/attention/hopper_forward_limits.cuh"

namespace pmf::cuda {

// ---- the copying warps --------------------------------------------------------------------------

template <class C>
__device__ inline void copy_tiles(const HopperForward& p, const HopperPlaces<C>& at) {
  RingPlace<C::kSlots> place;
  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x)) {
    const HopperItem here = hopper_item<C>(p, item);
    uint32_t head = uint32_t(here.head);
    p.by_group.divide(head);
    for (int j = 0; j < p.tiles; ++j, place = place.next()) {
      copy_tile(p, at, place, j * C::kKeys, int(head), here.batch);
    }
  }
}

template <class C>
__device__ inline void copy_queries(const HopperForward& p, const HopperPlaces<C>& at, int c) {
  uint32_t parity = 0;
  int i = 0;
  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x), ++i) {
    const HopperItem here = hopper_item<C>(p, item);
    const HopperShare share = hopper_share<C>(p, here, c, i);
    for (int r = 0; r < share.count; ++r, parity ^= 1) {
      const int row = (here.first + share.turn + r * C::kConsumers) * kRowBlock;
      mbarrier_wait(at.queries_empty(c), parity ^ 1);
      copy_rows<C, typename C::Rows>(at.queries(c), p.query, p.query_t, at.queries_full(c), row,
                                     here.head, here.batch);
    }
  }
}

// ---- the consumers ------------------------------------------------------------------------------

// Only the keys past the end are masked.
template <class C>
struct HopperEnd {
  const HopperForward& p;
  int lane_;

  __device__ int lane() const { return lane_; }
  __device__ int tiles() const { return p.tiles; }
  __device__ void hide(HopperUnit<C>& unit, int j) const {
    hide_past<C::kTangent>(unit.s, unit.ts, 2 * (lane_ & 3), p.keys - j * C::kKeys);
  }
};

template <class C>
__device__ inline void consume(const HopperForward& p, const HopperPlaces<C>& at, int c) {
  const int thread = int(threadIdx.x) % kGroupThreads, lane = thread % kWarpThreads;
  uint32_t query_parity = 0;
  RingPlace<C::kSlots> place;
  HopperUnit<C> unit;
  const HopperEnd<C> limits = {p, lane};
  int i = 0;
  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x), ++i) {
    const HopperItem here = hopper_item<C>(p, item);
    const HopperShare share = hopper_share<C>(p, here, c, i);
    if (share.count == 0) skip_tiles<C>(at, place, p.tiles, lane);
    for (int r = 0; r < share.count; ++r) {
      if (r > 0) place = place.before(p.tiles);
      unit.reset();
      mbarrier_wait(at.queries_full(c), query_parity);
      add_tiles<C>(p, at, c, unit, limits, place, r + 1 == share.count);
      query_parity ^= 1;
      const int query = (here.first + share.turn + r * C::kConsumers) * kRowBlock +
                        thread / kWarpThreads * 16 + (lane >> 2);
      unit.finish(p, here.batch, here.head, 0, query, p.queries, lane);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    hopper_forward_kernel(const __grid_constant__ HopperForward p) {
  const HopperPlaces<C> at = {shared_address(swizzled_shared())};
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < C::kSlots; ++slot) {
      mbarrier_init(at.keys_full(slot), 1);
      mbarrier_init(at.values_full(slot), 1);
      mbarrier_init(at.keys_empty(slot), C::kConsumers * kGroupWarps);
      mbarrier_init(at.values_empty(slot), C::kConsumers * kGroupWarps);
    }
    for (int c = 0; c < C::kConsumers; ++c) {
      mbarrier_init(at.queries_full(c), 1);
      mbarrier_init(at.queries_empty(c), kGroupWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  // Uniform across the warp, and the shuffle lets the compiler know.
  const int warp = shuffle_idx(int(threadIdx.x) / kWarpThreads, 0);
  if (warp < 4) {
    registers_down_to<24>();
    if constexpr (C::kLimited) {
      if (warp == 0) {
        if (elect_one()) copy_seen_tiles<C>(p, at);
      } else if (warp <= C::kConsumers) {
        copy_noted_queries<C>(p, at, warp - 1);
      }
    } else if (warp <= C::kConsumers && elect_one()) {
      warp == 0 ? copy_tiles<C>(p, at) : copy_queries<C>(p, at, warp - 1);
    }
  } else {
    registers_up_to<C::kRegisters>();
    if constexpr (C::kLimited) {
      consume_noted<C>(p, at, warp / 4 - 1);
    } else {
      consume<C>(p, at, warp / 4 - 1);
    }
  }
}

}  // namespace pmf::cuda
