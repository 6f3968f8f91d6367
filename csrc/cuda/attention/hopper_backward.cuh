// Attention backward without tangents, with Hopper instructions (hopper.cuh): the mathematics of
// attention_backward_queries.cuh, which writes the row statistics, then that of
// attention_backward_keys.cuh.
//
// Both are instances of one kernel: tiles of kColumns keys and values (or queries and gradients of
// out) stream past a row block of 64 queries and gradients of out (or keys and values). One warp
// accumulates each sum from beginning to end, in a fixed order and without atomics.
//
//   queries    S = Q K^T    B = G V^T      M += e K         Z += H K
//   keys       S = K Q^T    B = V G^T      dV += P^T G      dK += dS^T Q
//
// Blocks, warps, the ring and the order of computation are those of hopper_forward.cuh: S and B of
// the next tile are queued before the products of the current one, which overlap the exponentials.
// In the copying warpgroup, one warp copies tiles, one warp per consumer copies its rows, and for
// the keys one more copies the row statistics of each tile.
//
// Registers: S, B and the two factors that they become take 64 x kColumns each, the two sums 64 x
// kWidth each: 208 of the 240 registers per thread at width 64 and 96 columns, 200 at 128 and 48.
// FLOPs: 4 products per kernel, 2 Nq Nk D each; a single kernel with atomics would need 5 in all.
// Bytes: as in the other kernels, with 64 rows per pass over the streamed side, or all rows of a
// head if its tiles stay. Bound: the tensor cores; at width 64 a tile takes them 768 cycles, beside
// half as many for exponentials and (an estimate) nearly as many for other instructions.
#pragma once

#include "cuda/attention/attention_backward_queries.cuh"
#include "cuda/attention/hopper_tile.cuh"
#include "cuda/common/divisor.h"

namespace pmf::cuda {

constexpr int kBackwardSides = 2;
// Of |lse| in base 2. The queries' launch does not round scores times the factor, the keys' launch
// does: up to here, weights differ by at most 2e-4.
constexpr float kLargestKnown = 4096.0f;

// The parameters of either launch.
struct HopperBackward {
  HopperMaps row[kBackwardSides], column[kBackwardSides];  // Q and G, K and V; or K and V, Q and G
  View4 gradient[2];                                       // of Q; or of V and K
  float* statistics;            // attention_backward.cuh: [batch, heads, statistic, padded_queries]
  const float *lse, *grad_lse;  // [batch, heads, queries]; the second may be null
  int heads, rows, columns;     // rows and columns (the streamed side) per head
  int tiles, row_blocks, rounds, items;  // as in HopperForward
  int padded_queries;
  Divisor by_parts, by_heads;
  float factor, scale;
};

template <typename T, int kWidth, int kColumns_, int kSlots_, bool kByKeys_>
struct HopperBackwardSizes : HopperShape<T, kWidth, kColumns_, kBackwardSides> {
  using Base = HopperShape<T, kWidth, kColumns_, kBackwardSides>;
  static constexpr int kColumns = kColumns_, kSlots = kSlots_, kConsumers = 2;
  static constexpr bool kByKeys = kByKeys_;
  static constexpr uint32_t kRowsBytes = Base::Rows::kBytes, kSlotBytes = Base::Tile::kBytes;
  static constexpr uint32_t kStatisticBytes = kByKeys ? kStatistics<false> * kColumns * 4 : 0;
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
__device__ inline void copy_tiles(const HopperBackward& p, const HopperBackwardPlaces<C>& at) {
  RingPlace<C::kSlots> place;
  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x)) {
    const HopperItem here = hopper_item<C>(p, item);
    for (int j = 0; j < p.tiles; ++j, place = place.next()) {
      mbarrier_wait(at.empty(place.slot), place.parity ^ 1);
      copy_rows<C, typename C::Tile>(at.tile(place.slot), p.column[0], p.column[1],
                                     at.full(place.slot), j * C::kColumns, here.head, here.batch);
    }
  }
}

template <class C>
__device__ inline void copy_row_blocks(const HopperBackward& p, const HopperBackwardPlaces<C>& at,
                                       int c) {
  uint32_t parity = 0;
  int i = 0;
  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x), ++i) {
    const HopperItem here = hopper_item<C>(p, item);
    const HopperShare share = hopper_share<C>(p, here, c, i);
    for (int r = 0; r < share.count; ++r, parity ^= 1) {
      const int row = (here.first + share.turn + r * C::kConsumers) * kRowBlock;
      mbarrier_wait(at.rows_empty(c), parity ^ 1);
      copy_rows<C, typename C::Rows>(at.rows(c), p.row[0], p.row[1], at.rows_full(c), row,
                                     here.head, here.batch);
    }
  }
}

// One statistic of all queries of a head.
__device__ inline float* statistics_of(const HopperBackward& p, const HopperItem& here, int which) {
  const int64_t head = int64_t(here.batch) * p.heads + here.head;
  return p.statistics + (head * kStatistics<false> + which) * p.padded_queries;
}

// Called by a whole warp. Entries past the last query are zero, so their weight is zero.
template <class C>
__device__ inline void copy_statistics(const HopperBackward& p, const HopperBackwardPlaces<C>& at) {
  constexpr int kFloats = kChunkBytes / 4, kCopies = C::kColumns / kFloats;  // of one statistic
  const int lane = int(threadIdx.x) % kWarpThreads;
  RingPlace<C::kSlots> place;
  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x)) {
    const float* const from = statistics_of(p, hopper_item<C>(p, item), 0);
    for (int j = 0; j < p.tiles; ++j, place = place.next()) {
      mbarrier_wait(at.empty(place.slot), place.parity ^ 1);
      float* const to = at.statistics(place.slot);
      for (int i = lane; i < kStatistics<false> * kCopies; i += kWarpThreads) {
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

// Stores a row block's gradient after its last tile.
template <class T, int kOutTiles>
__device__ inline void store_gradient(const float (&sums)[kOutTiles][4], const View4& view,
                                      const HopperItem& here, int row, int rows, int lane) {
  T* const start = static_cast<T*>(view.data) + int64_t(here.batch) * view.stride[0] +
                   int64_t(here.head) * view.stride[1];
  store_rows<true>(sums, start, view.stride[2], 1, row, rows, 8 * kOutTiles, lane);
}

// The registers of a warp: 16 rows of the row block.
template <class C>
struct HopperBackwardUnit {
  using E = typename C::E;

  float s[C::kTiles][4], b[C::kTiles][4];
  float x[C::kOutTiles][4], y[C::kOutTiles][4];  // M and Z, or dV and dK
  FragmentA weights[C::kDepths], derivatives[C::kDepths];

  // For queries only, as in attention_backward_queries.
  MovingMean state;
  float sums[4];   // of the rounded rows of e and H: l and r of row g, then of row g + 8
  float known[2];  // lse
  float moved[2];  // c times the gradient of lse
  bool searches;   // for the maximum; otherwise lse replaces it

  __device__ void reset() {
    clear(x);
    clear(y);
    for (float& each : sums) each = 0.0f;
  }
  // `row`: row g of the lane.
  __device__ void look_up(const HopperBackward& p, const HopperItem& here, int row) {
    if constexpr (C::kByKeys) return;
    const float* const lse = p.lse + (int64_t(here.batch) * p.heads + here.head) * p.rows;
#pragma unroll
    for (int h = 0; h < 2; ++h) known[h] = row + 8 * h < p.rows ? lse[row + 8 * h] : 0.0f;
  }
  // lse, which exceeds the maximum by at most log(Nk), takes its place, so no tile requires
  // rescaling. If lse is large or not finite, the maximum is found tile by tile, as in the other
  // kernels.
  __device__ void expect() {
    if constexpr (C::kByKeys) return;
    state = MovingMean();
    searches = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      state.top[h] = kLog2eFloat * known[h];
      searches = searches || !(fabsf(state.top[h]) <= kLargestKnown);
    }
    searches = any_lane(searches);
    if (searches) state.top[0] = state.top[1] = -INFINITY;
  }

  // After the last tile, as in attention_backward_queries. `row`: row g of the lane.
  __device__ void store_statistics(const HopperBackward& p, const HopperItem& here, int row,
                                   int lane) {
    if constexpr (C::kByKeys) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = row + 8 * h;
      const bool exists = query < p.rows, nothing = state.mass[h] == 0.0f || !exists;
      moved[h] = 0.0f;
      if (p.grad_lse != nullptr && exists) {
        const int64_t head = int64_t(here.batch) * p.heads + here.head;
        moved[h] = p.scale * p.grad_lse[head * p.rows + query];
      }
      if ((lane & 3) != 0) continue;
      statistics_of(p, here, kTop)[query] = nothing ? INFINITY : state.top[h];
      statistics_of(p, here, kWeight)[query] = nothing ? 0.0f : rcp_approx(state.mass[h]);
      statistics_of(p, here, kD)[query] = nothing ? 0.0f : state.mean[h] - moved[h];
    }
  }

  // Keep the compiler from moving accesses to these registers across (see hold()).
  __device__ void hold_scores() {
    hold(s);
    hold(b);
  }
  __device__ void hold_results() {
    hold(x);
    hold(y);
#pragma unroll
    for (int i = 0; i < C::kDepths; ++i) {
      hold(weights[i].x);
      hold(derivatives[i].x);
    }
  }

  __device__ void multiply_scores(uint32_t rows, uint32_t tile) {
    wgmma_across<C, 0, 0>(s, rows, tile, false);
    wgmma_across<C, 1, 1>(b, rows, tile, false);
  }
  __device__ void multiply_results(uint32_t tile) {
#pragma unroll
    for (int i = 0; i < C::kDepths; ++i) {
      wgmma_down<C, C::kByKeys ? 1 : 0>(x, weights[i], tile, i);
      wgmma_down<C, 0>(y, derivatives[i], tile, i);
    }
  }
  // Sums the tile's rows by products with ones: two chains, as each product waits for its
  // predecessor.
  __device__ void add_up(int lane) {
    if constexpr (C::kByKeys) return;
    float others[4] = {};
#pragma unroll
    for (int i = 0; i < C::kDepths; ++i) {
      add_row_sums<E>(i % 2 == 0 ? sums : others, weights[i], derivatives[i], lane);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[e] += others[e];
  }

  // Turns S and B of tile j into e and H, or into P^T and dS^T.
  __device__ void differentiate(const HopperBackward& p, int j, const float* statistics, int lane) {
    const int column = 2 * (lane & 3);
    if constexpr (!C::kByKeys) {
      if (j + 1 == p.tiles) hide_past<true>(s, b, column, p.columns - j * C::kColumns);
      // Two calls of weigh(), so that the common path can finish before the caller's next wait.
      if (searches) {
        search(p);
      } else {
        weigh(p, [&](float x, int h) { return fmaf(x, p.factor, -state.top[h]); });
      }
      return;
    }
    multiply_by_factor(p);
    const auto pair = [&](int which, int n) {
      return *reinterpret_cast<const float2*>(statistics + which * C::kColumns + 8 * n + column);
    };
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
      const float2 top = pair(kTop, n), weight = pair(kWeight, n), mean = pair(kD, n);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool odd = e % 2 == 1;
        s[n][e] = exp2_approx(s[n][e] - (odd ? top.y : top.x)) * (odd ? weight.y : weight.x);
        b[n][e] = s[n][e] * fmaf(p.scale, b[n][e], -(odd ? mean.y : mean.x));
      }
    }
  }

  // Adapts the sums to the next tile; pack() then converts its factors.
  __device__ void follow_mean() {
    if constexpr (!C::kByKeys) {
#pragma unroll
      for (int n = 0; n < C::kOutTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) y[n][e] = fmaf(-state.delta[e / 2], x[n][e], y[n][e]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sums[2 * h + 1] = fmaf(-state.delta[h], sums[2 * h], sums[2 * h + 1]);
      }
    }
  }
  __device__ void pack() {
#pragma unroll
    for (int i = 0; i < C::kDepths; ++i) {
      weights[i] = E::pack_a(s + 2 * i);
      derivatives[i] = E::pack_a(b + 2 * i);
    }
  }

  // `row`: row g of the lane.
  __device__ void finish(const HopperBackward& p, const HopperItem& here, int row, int lane) {
    using T = typename C::T;
    if constexpr (C::kByKeys) {
      store_gradient<T>(x, p.gradient[0], here, row, p.rows, lane);
      store_gradient<T>(y, p.gradient[1], here, row, p.rows, lane);
    } else {
      finish_queries();
      store_gradient<T>(y, p.gradient[0], here, row, p.rows, lane);
    }
  }

 private:
  __device__ void multiply_by_factor(const HopperBackward& p) {
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] *= p.factor;
    }
  }
  // As weigh(), but searches for the maximum first; the sums are rescaled once they are complete.
  __device__ void search(const HopperBackward& p) {
    wgmma_wait<0>();
    hold_results();
    multiply_by_factor(p);
    raise(state, s);
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      base[h] = state.top[h] == -INFINITY ? 0.0f : state.top[h];
      state.mass[h] *= state.shrink[h];
      sums[2 * h] *= state.shrink[h], sums[2 * h + 1] *= state.shrink[h];
#pragma unroll
      for (int n = 0; n < C::kOutTiles; ++n) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          x[n][e] *= state.shrink[h], y[n][e] *= state.shrink[h];
        }
      }
    }
    weigh(p, [&](float x, int h) { return x - base[h]; });
  }
  // Turns S into e, given its exponents, and B into H. D comes from sums of e B: their rounding
  // errors shift all of a row's H alike, and finish_queries() removes that.
  template <class Exponent>
  __device__ void weigh(const HopperBackward& p, Exponent exponent) {
    float mass[4] = {}, moments[4] = {};
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[n][e] = exp2_approx(exponent(s[n][e], e / 2));
        mass[e] += s[n][e];
        moments[e] = fmaf(s[n][e], b[n][e], moments[e]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float before = state.mass[h];
      state.mass[h] = before + quad_sum(mass[2 * h] + mass[2 * h + 1]);
      const float moment = p.scale * quad_sum(moments[2 * h] + moments[2 * h + 1]);
      const float mean = state.mass[h] == 0.0f
                             ? 0.0f
                             : fmaf(state.mean[h], before, moment) * rcp_approx(state.mass[h]);
      state.delta[h] = mean - state.mean[h];
      state.mean[h] = mean;
    }
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        b[n][e] = s[n][e] * fmaf(p.scale, b[n][e], -state.mean[e / 2]);
      }
    }
  }

  // As in attention_backward_queries: turns Z into the gradient.
  __device__ void finish_queries() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float l = sums[2 * h], r = sums[2 * h + 1], share = rcp_approx(l);
      const float back = fmaf(-r, share, moved[h]);
#pragma unroll
      for (int n = 0; n < C::kOutTiles; ++n) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          y[n][e] = l == 0.0f ? 0.0f : share * fmaf(back, x[n][e], y[n][e]);
        }
      }
    }
  }
};

template <class C>
__device__ inline void consume(const HopperBackward& p, const HopperBackwardPlaces<C>& at, int c) {
  const int thread = int(threadIdx.x) % kGroupThreads, lane = thread % kWarpThreads;
  const auto release = [&](uint32_t barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };
  const uint32_t rows = at.rows(c);
  uint32_t rows_parity = 0;
  RingPlace<C::kSlots> place;
  HopperBackwardUnit<C> unit;
  int i = 0;
  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x), ++i) {
    const HopperItem here = hopper_item<C>(p, item);
    const HopperShare share = hopper_share<C>(p, here, c, i);
    if (share.count == 0) {
      for (int j = 0; j < p.tiles; ++j, place = place.next()) {
        mbarrier_wait(at.full(place.slot), place.parity);
        release(at.empty(place.slot));
      }
    }
    for (int r = 0; r < share.count; ++r) {
      const bool last = r + 1 == share.count;
      if (r > 0) place = place.before(p.tiles);
      const int row = (here.first + share.turn + r * C::kConsumers) * kRowBlock +
                      thread / kWarpThreads * 16 + (lane >> 2);
      unit.reset();
      unit.look_up(p, here, row);
      mbarrier_wait(at.rows_full(c), rows_parity);
      mbarrier_wait(at.full(place.slot), place.parity);
      unit.hold_scores();
      wgmma_fence();
      unit.multiply_scores(rows, at.tile(place.slot));
      wgmma_commit();
      wgmma_wait<0>();
      unit.hold_scores();
      if (p.tiles == 1) release(at.rows_empty(c));
      unit.expect();
      unit.differentiate(p, 0, at.statistics(place.slot), lane);
      unit.pack();
#pragma unroll 1
      for (int j = 1; j < p.tiles; ++j) {
        const RingPlace<C::kSlots> next = place.next();
        mbarrier_wait(at.full(next.slot), next.parity);
        unit.hold_scores();
        unit.hold_results();
        wgmma_fence();
        unit.multiply_scores(rows, at.tile(next.slot));
        wgmma_commit();
        wgmma_fence();
        unit.multiply_results(at.tile(place.slot));
        wgmma_commit();
        unit.add_up(lane);
        wgmma_wait<1>();
        unit.hold_scores();
        if (j + 1 == p.tiles) release(at.rows_empty(c));
        unit.differentiate(p, j, at.statistics(next.slot), lane);
        unit.hold_scores();
        wgmma_wait<0>();
        unit.hold_results();
        if (last) release(at.empty(place.slot));
        unit.follow_mean();
        unit.pack();
        place = next;
      }
      rows_parity ^= 1;
      unit.hold_results();
      wgmma_fence();
      unit.multiply_results(at.tile(place.slot));
      wgmma_commit();
      unit.add_up(lane);
      wgmma_wait<0>();
      unit.hold_results();
      if (last) release(at.empty(place.slot));
      place = place.next();
      unit.store_statistics(p, here, row, lane);
      unit.finish(p, here, row, lane);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(3 * kGroupThreads, 1)
    hopper_backward_kernel(const __grid_constant__ HopperBackward p) {
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
    consume<C>(p, at, warp / 4 - 1);
  }
}

}  // namespace pmf::cuda
