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
#pragma once

#include "cuda/attention/attention_forward.cuh"
#include "cuda/attention/hopper_tile.cuh"
#include "cuda/common/divisor.h"

namespace pmf::cuda {

// The kernel's parameters.
struct HopperForward {
  HopperMaps query, query_t, key, key_t, value, value_t;
  View4 out, out_t;
  float *lse, *lse_t;  // [batch, heads, queries]; lse_t may be null
  int heads, queries, keys;
  int tiles, row_blocks, rounds;  // per head; rounds: row blocks per consumer and item
  int items;
  Divisor by_parts, by_heads, by_group;  // items per head, heads, heads per key head
  float factor, scale;                   // of scores in log-2 units; of their tangents
};

template <typename T, int kWidth, int kKeys_, int kSlots_, bool kTangent_>
struct HopperSizes : HopperShape<T, kWidth, kKeys_, kTangent_ ? 2 : 1> {
  using Base = HopperShape<T, kWidth, kKeys_, kTangent_ ? 2 : 1>;
  static constexpr int kKeys = kKeys_, kSlots = kSlots_;
  static constexpr bool kTangent = kTangent_;
  // Warpgroups that compute, and registers per thread of theirs.
  static constexpr int kConsumers = kTangent ? 2 : 3, kRegisters = kTangent ? 240 : 160;
  static constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
  // Keys or values of a slot, and queries of a consumer, each with their tangents.
  static constexpr uint32_t kSideBytes = Base::Tile::kBytes, kSlotBytes = 2 * kSideBytes;
  static constexpr uint32_t kQueryBytes = Base::Rows::kBytes;
  // Shared memory: the queries of each consumer, the ring, the barriers.
  static constexpr uint32_t kRing = kConsumers * kQueryBytes;
  static constexpr uint32_t kBarriers = kRing + kSlots * kSlotBytes;
  static constexpr int kBarrierCount = 4 * kSlots + 2 * kConsumers;
  static constexpr int kSharedBytes = int(kBarriers) + 8 * kBarrierCount;
};

// Addresses in shared memory.
template <class C>
struct HopperPlaces {
  uint32_t base;

  __device__ uint32_t queries(int consumer) const {
    return base + uint32_t(consumer) * C::kQueryBytes;
  }
  __device__ uint32_t keys(int slot) const {
    return base + C::kRing + uint32_t(slot) * C::kSlotBytes;
  }
  __device__ uint32_t values(int slot) const { return keys(slot) + C::kSideBytes; }

  __device__ uint32_t keys_full(int slot) const { return barrier(slot); }
  __device__ uint32_t values_full(int slot) const { return barrier(C::kSlots + slot); }
  __device__ uint32_t keys_empty(int slot) const { return barrier(2 * C::kSlots + slot); }
  __device__ uint32_t values_empty(int slot) const { return barrier(3 * C::kSlots + slot); }
  __device__ uint32_t queries_full(int c) const { return barrier(4 * C::kSlots + c); }
  __device__ uint32_t queries_empty(int c) const {
    return barrier(4 * C::kSlots + C::kConsumers + c);
  }

 private:
  __device__ uint32_t barrier(int i) const { return base + C::kBarriers + 8 * uint32_t(i); }
};

// ---- the copying warps --------------------------------------------------------------------------

template <class C>
__device__ inline void copy_keys_and_values(const HopperForward& p, const HopperPlaces<C>& at) {
  RingPlace<C::kSlots> place;
  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x)) {
    const HopperItem here = hopper_item<C>(p, item);
    uint32_t head = uint32_t(here.head);
    p.by_group.divide(head);
    for (int j = 0; j < p.tiles; ++j, place = place.next()) {
      const int row = j * C::kKeys;
      mbarrier_wait(at.keys_empty(place.slot), place.parity ^ 1);
      copy_rows<C, typename C::Tile>(at.keys(place.slot), p.key, p.key_t, at.keys_full(place.slot),
                                     row, int(head), here.batch);
      mbarrier_wait(at.values_empty(place.slot), place.parity ^ 1);
      copy_rows<C, typename C::Tile>(at.values(place.slot), p.value, p.value_t,
                                     at.values_full(place.slot), row, int(head), here.batch);
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

// The registers of a warp: 16 queries of the row block.
template <class C>
struct HopperUnit {
  using E = typename C::E;

  RowState rows;
  float s[C::kTiles][4], ts[C::kTiles][4];
  float o[C::kOutTiles][4], ot[C::kTangent ? C::kOutTiles : 1][4];
  FragmentA probability[C::kDepths], h[C::kTangent ? C::kDepths : 1];

  __device__ void reset() {
    rows = RowState();
    clear(o);
    clear(ot);
  }

  // Keep the compiler from moving accesses to these registers across (see hold()).
  __device__ void hold_scores() {
    hold(s);
    if constexpr (C::kTangent) hold(ts);
  }
  __device__ void hold_results() {
    hold(o);
    if constexpr (C::kTangent) hold(ot);
#pragma unroll
    for (int i = 0; i < C::kDepths; ++i) {
      hold(probability[i].x);
      if constexpr (C::kTangent) hold(h[i].x);
    }
  }

  // S = Q K^T,  tS = Q tK^T + tQ K^T.
  __device__ void multiply_scores(uint32_t queries, uint32_t keys) {
    wgmma_across<C, 0, 0>(s, queries, keys, false);
    if constexpr (C::kTangent) {
      wgmma_across<C, 0, 1>(ts, queries, keys, false);
      wgmma_across<C, 1, 0>(ts, queries, keys, true);
    }
  }

  // O += P V,  tO += P tV + H V.
  __device__ void multiply_values(uint32_t values) {
#pragma unroll
    for (int i = 0; i < C::kDepths; ++i) {
      wgmma_down<C, 0>(o, probability[i], values, i);
      if constexpr (C::kTangent) {
        wgmma_down<C, 1>(ot, probability[i], values, i);
        wgmma_down<C, 0>(ot, h[i], values, i);
      }
    }
  }

  // Masks the tile's keys from `left` on; `column`: the lane's first column.
  __device__ void hide(int column, int left) {
#pragma unroll
    for (int j = C::kTiles - 1; j >= 0; --j) {
      if (8 * j + 8 <= left) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (8 * j + e % 2 < left - column) continue;
        s[j][e] = -INFINITY;
        if constexpr (C::kTangent) ts[j][e] = 0.0f;
      }
    }
  }

  // Rescales O and tO for the next tile; pack() then converts its P and H and sums them as rounded.
  __device__ void rescale() {
#pragma unroll
    for (int n = 0; n < C::kOutTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        o[n][e] *= rows.rescale[e / 2];
        if constexpr (C::kTangent) {
          ot[n][e] = fmaf(-rows.delta[e / 2], o[n][e], ot[n][e] * rows.rescale[e / 2]);
        }
      }
    }
  }
  __device__ void pack() {
    float sums[4] = {}, sums_t[4] = {};
#pragma unroll
    for (int i = 0; i < C::kDepths; ++i) {
      probability[i] = E::pack_a(s + 2 * i);
      E::multiply(sums, probability[i], E::ones(true));
      if constexpr (C::kTangent) {
        h[i] = E::pack_a(ts + 2 * i);
        E::multiply(sums_t, h[i], E::ones(true));
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows.sum[r] = fmaf(rows.sum[r], rows.rescale[r], sums[2 * r]);
      if constexpr (C::kTangent) rows.tangent[r] += sums_t[2 * r];
    }
  }

  // Like ForwardUnit::finish(). `query`: row g of the lane.
  __device__ void finish(const HopperForward& p, const HopperItem& item, int query, int lane) {
    constexpr float kLn2 = 0.6931471805599453f;
    using T = typename C::T;
    const auto start = [&](const View4& view) {
      return static_cast<T*>(view.data) + int64_t(item.batch) * view.stride[0] +
             int64_t(item.head) * view.stride[1];
    };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = rows.sum[r];
      const float inverse = sum == 0.0f ? 0.0f : rcp_approx(sum);
      const float residual = rows.tangent[r] * inverse;
#pragma unroll
      for (int n = 0; n < C::kOutTiles; ++n) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          o[n][e] *= inverse;
          if constexpr (C::kTangent) ot[n][e] = fmaf(-residual, o[n][e], ot[n][e] * inverse);
        }
      }
      if ((lane & 3) == 0 && query + 8 * r < p.queries) {
        const int64_t row = (int64_t(item.batch) * p.heads + item.head) * p.queries + query + 8 * r;
        p.lse[row] = sum == 0.0f ? -INFINITY : kLn2 * (rows.top[r] + log2_approx(sum));
        if (C::kTangent && p.lse_t != nullptr) p.lse_t[row] = rows.pivot[r] + residual;
      }
    }
    store_rows<true>(o, start(p.out), p.out.stride[2], 1, query, p.queries, C::kWidth, lane);
    if constexpr (C::kTangent) {
      store_rows<true>(ot, start(p.out_t), p.out_t.stride[2], 1, query, p.queries, C::kWidth, lane);
    }
  }
};

template <class C>
__device__ inline void consume(const HopperForward& p, const HopperPlaces<C>& at, int c) {
  const int thread = int(threadIdx.x) % kGroupThreads, lane = thread % kWarpThreads;
  const auto release = [&](uint32_t barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };
  const uint32_t queries = at.queries(c);
  uint32_t query_parity = 0;
  RingPlace<C::kSlots> place;
  HopperUnit<C> unit;
  int i = 0;
  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x), ++i) {
    const HopperItem here = hopper_item<C>(p, item);
    const HopperShare share = hopper_share<C>(p, here, c, i);
    if (share.count == 0) {
      for (int j = 0; j < p.tiles; ++j, place = place.next()) {
        mbarrier_wait(at.keys_full(place.slot), place.parity);
        release(at.keys_empty(place.slot));
        mbarrier_wait(at.values_full(place.slot), place.parity);
        release(at.values_empty(place.slot));
      }
    }
    for (int r = 0; r < share.count; ++r) {
      const bool last = r + 1 == share.count;
      if (r > 0) place = place.before(p.tiles);
      unit.reset();
      mbarrier_wait(at.queries_full(c), query_parity);
      mbarrier_wait(at.keys_full(place.slot), place.parity);
      unit.hold_scores();
      wgmma_fence();
      unit.multiply_scores(queries, at.keys(place.slot));
      wgmma_commit();
      wgmma_wait<0>();
      unit.hold_scores();
      if (last) release(at.keys_empty(place.slot));
      const int column = 2 * (lane & 3);
      if (p.tiles == 1) {
        release(at.queries_empty(c));
        unit.hide(column, p.keys);
      }
      softmax_tile<C::kTangent>(unit.rows, unit.s, unit.ts, p.factor, p.scale);
      unit.pack();
#pragma unroll 1
      for (int j = 1; j < p.tiles; ++j) {
        const RingPlace<C::kSlots> next = place.next();
        mbarrier_wait(at.keys_full(next.slot), next.parity);
        unit.hold_scores();
        unit.hold_results();
        wgmma_fence();
        unit.multiply_scores(queries, at.keys(next.slot));
        wgmma_commit();
        mbarrier_wait(at.values_full(place.slot), place.parity);
        wgmma_fence();
        unit.multiply_values(at.values(place.slot));
        wgmma_commit();
        wgmma_wait<1>();
        unit.hold_scores();
        if (last) release(at.keys_empty(next.slot));
        if (j + 1 == p.tiles) {
          release(at.queries_empty(c));
          unit.hide(column, p.keys - j * C::kKeys);
        }
        softmax_tile<C::kTangent>(unit.rows, unit.s, unit.ts, p.factor, p.scale);
        unit.hold_scores();
        wgmma_wait<0>();
        unit.hold_results();
        if (last) release(at.values_empty(place.slot));
        unit.rescale();
        unit.pack();
        place = next;
      }
      query_parity ^= 1;
      mbarrier_wait(at.values_full(place.slot), place.parity);
      unit.hold_results();
      wgmma_fence();
      unit.multiply_values(at.values(place.slot));
      wgmma_commit();
      wgmma_wait<0>();
      unit.hold_results();
      if (last) release(at.values_empty(place.slot));
      place = place.next();
      const int query = (here.first + share.turn + r * C::kConsumers) * kRowBlock +
                        thread / kWarpThreads * 16 + (lane >> 2);
      unit.finish(p, here, query, lane);
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
    if (warp <= C::kConsumers && elect_one()) {
      warp == 0 ? copy_keys_and_values<C>(p, at) : copy_queries<C>(p, at, warp - 1);
    }
  } else {
    registers_up_to<C::kRegisters>();
    consume<C>(p, at, warp / 4 - 1);
  }
}

}  // namespace pmf::cuda
