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
// A row block's results are divided and stored while the tensor cores compute the next one's first
// scores. At width 80, where tiles are small, queries are multiplied from registers.
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

  __device__ int lane() const { return int(threadIdx.x % kWarpThreads); }
  __device__ int tiles() const { return p.tiles; }
  __device__ void hide(HopperUnit<C>& unit, int j) const {
    const int column = 2 * int(thread_of_group() & 3);
    hide_past(unit.s, column, p.keys - j * C::kKeys);
  }
};

// After the last row block, its queries are multiplied once more, with its last tile, and nobody
// reads the result: if these products were conditional, ptxas would wait for every one. The wait
// for those queries is for their phase, which is over.
template <class C>
__device__ inline void consume(const HopperForward& p, const HopperPlaces<C>& at, int c) {
  const int lane = int(threadIdx.x) % kWarpThreads;
  uint32_t query_parity = 0;
  RingPlace<C::kSlots> place;
  HopperUnit<C> unit;
  const HopperEnd<C> limits = {p};
  HopperItem done;    // of the row block before
  int row = -1;       // its number
  bool last = false;  // whether the values of its last tile, before `place`, are to be released
  for (int item = int(blockIdx.x), turn = c;; item += int(gridDim.x)) {
    const bool any = item < p.items;
    const HopperItem here = hopper_item<C>(p, any ? item : 0);
    int next = here.first + turn;
    turn = turn + 1 == C::kConsumers ? 0 : turn + 1;
    if (any && next >= p.row_blocks) {  // it has no row block
      end_tiles<C, 0>(at, unit, place, last, lane);
      last = false;
      skip_tiles<C>(at, place, p.tiles, lane);
      continue;
    }
    if (!any && row < 0) {  // it never had one
      wgmma_wait<0>();
      return;
    }
    do {
      const RingPlace<C::kSlots> from = any ? place : place.before(1);
      mbarrier_wait(at.queries_full(c), query_parity ^ uint32_t(!any));
      if constexpr (C::kOwnQueries) {
        unit.load_queries(swizzled_shared() + c * C::kQueryBytes, int(thread_of_group()));
        __syncwarp();
        if (any) release(at.queries_empty(c), lane);
      }
      mbarrier_wait(at.keys_full(from.slot), from.parity);
      begin_tiles<C>(at, unit, at.queries(c), from);
      end_tiles<C, 1>(at, unit, place, last, lane);
      if (row >= 0) {
        const uint32_t thread = thread_of_group();
        const int query = row * kRowBlock + int(thread / kWarpThreads * 16 + thread % 32 / 4);
        unit.finish(p, done.batch, done.head, 0, query, p.queries, int(thread % kWarpThreads));
      }
      if (!any) {
        wgmma_wait<0>();
        return;
      }
      unit.reset();
      last = p.rounds == 1 || next + C::kConsumers >= p.row_blocks;
      add_tiles<C>(p, at, c, unit, limits, place, last);
      query_parity ^= 1;
      if (!last) place = place.before(p.tiles);
      done = here, row = next, next += C::kConsumers;
    } while (!last);
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
