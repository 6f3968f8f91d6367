// Attention backward without tangents, with Hopper instructions (hopper.cuh): the mathematics of
// attention_backward_queries.cuh, which writes the row statistics, then that of
// attention_backward_keys.cuh. hopper_backward_heads.cuh has both passes in one launch,
// hopper_backward_tangents.cuh the backward through both outputs.
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

#include "cuda/attention/hopper_backward_block.cuh"

namespace pmf::cuda {

// Of |lse| in base 2: up to here, rounding moves it by at most 1/16, and no exponential is large.
constexpr float kLargestKnown = 1048576.0f;
constexpr float kLeastMass = 1e-37f;  // in place of zero, as a divisor

// What is known of a warp's queries beforehand, a number per lane: lanes 4 g and 4 g + 1 have lse
// of rows g and g + 8, the next two its gradient (zero if there is none). `row`: row g of the lane.
template <class Launch>
__device__ inline float known(const Launch& p, const HopperItem& here, int row, int rows,
                              int lane) {
  const float* const from = (lane & 2) == 0 ? p.lse : p.grad_lse;
  const int own = row + 8 * (lane & 1);
  const int64_t first = (int64_t(here.batch) * p.heads + here.head) * rows;
  return from != nullptr && own < rows ? from[first + own] : 0.0f;
}

// The registers of a warp: 16 rows of the row block. kByKeys: whether they are keys.
template <class C>
struct HopperBackwardUnit {
  using E = typename C::E;

  float s[C::kTiles][4], b[C::kTiles][4];
  float x[C::kOutTiles][4], y[C::kOutTiles][4];  // M and Z, or dV and dK
  FragmentA weights[C::kDepths], derivatives[C::kDepths];

  // For queries only, as in attention_backward_queries.
  MovingMean state;
  float mass[2], moment[2];  // of the tile, this lane's sums of e and H, unrounded
  float l[4], r[4];          // sums of the rounded rows of e and H: [0] of row g, [2] of row g + 8
  float given;               // known()
  bool searches;  // for the maximum, so that state.top is one of S; otherwise lse replaces it

  // lse, which exceeds the maximum by at most log(Nk), takes its place, so no tile requires
  // rescaling. If lse is large or not finite, the maximum is found tile by tile, as in the other
  // kernels.
  __device__ void expect(float known, int lane) {
    given = known;
    state = MovingMean();
    searches = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      state.top[h] = kLog2eFloat * shuffle_idx(given, (lane & ~3) + h);
      searches = searches || !(fabsf(state.top[h]) <= kLargestKnown);
    }
    searches = any_lane(searches);
    if (searches) state.top[0] = state.top[1] = -INFINITY;
#pragma unroll
    for (int e = 0; e < 4; ++e) l[e] = r[e] = 0.0f;
  }
  // Adds up the rows of the packed tile.
  __device__ void add_up() {
    const FragmentB ones = E::ones(true);
#pragma unroll
    for (int i = 0; i < C::kDepths; ++i) {
      E::multiply(l, weights[i], ones);
      E::multiply(r, derivatives[i], ones);
    }
  }

  // After the last tile, the statistics of the lane's rows, `stride` apart. Here, kWeight is the
  // logarithm of the weight: P = 2^((S factor - top) + weight), of which the first difference loses
  // nothing where P matters, however large the scores are. `row`: row g of the lane, of `rows`.
  template <class Launch>
  __device__ void store_statistics(const Launch& p, float* statistics, int stride, int row,
                                   int rows, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float moved = p.scale * shuffle_idx(given, (lane & ~3) + 2 + h);
      if ((lane & 3) != 0) continue;
      const int query = row + 8 * h;
      const bool nothing = state.mass[h] == 0.0f || query >= rows;
      const float top = searches ? p.factor * state.top[h] : state.top[h];
      const float rounded_off = searches ? fmaf(p.factor, state.top[h], -top) : 0.0f;
      float* const to = statistics + query;
      to[kTop * stride] = nothing ? INFINITY : top;
      to[kWeight * stride] = nothing ? 0.0f : -rounded_off - log2_approx(state.mass[h]);
      to[kD * stride] = nothing ? 0.0f : state.mean[h] - moved;
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
  // The first tile's results overwrite those of the row block before.
  template <bool kByKeys>
  __device__ void multiply_results(uint32_t tile, bool is_first) {
#pragma unroll
    for (int i = 0; i < C::kDepths; ++i) {
      wgmma_down<C, kByKeys ? 1 : 0>(x, weights[i], tile, i, !is_first || i > 0);
      wgmma_down<C, 0>(y, derivatives[i], tile, i, !is_first || i > 0);
    }
  }

  // Turns S and B of a tile into e and H, or into P^T and dS^T. kFirst: whether it is the row
  // block's first tile; `left`: the columns from this tile on; `statistics`: of the tile's queries,
  // `stride` apart.
  template <bool kByKeys, bool kFirst, class Launch>
  __device__ void differentiate(const Launch& p, int left, const float* statistics, int stride,
                                int lane) {
    const int column = 2 * (lane & 3);
    if constexpr (!kByKeys) {
      if (left < C::kColumns) hide_past(s, column, left);
      // Two calls of weigh(), so that the common path can finish before the caller's next wait.
      if (searches) {
        search<kFirst>(p);
      } else {
        weigh(p, [&](float x, int h) { return fmaf(x, p.factor, -state.top[h]); });
      }
      return;
    }
    const auto pair = [&](int which, int n) {
      return *reinterpret_cast<const float2*>(statistics + which * stride + 8 * n + column);
    };
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
      const float2 top = pair(kTop, n), weight = pair(kWeight, n), mean = pair(kD, n);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool odd = e % 2 == 1;
        const float exponent = fmaf(s[n][e], p.factor, -(odd ? top.y : top.x));
        s[n][e] = exp2_approx(exponent + (odd ? weight.y : weight.x));
        b[n][e] = s[n][e] * fmaf(p.scale, b[n][e], -(odd ? mean.y : mean.x));
      }
    }
  }

  // Moves the mean to that of all tiles so far, and H with it.
  __device__ void move_mean() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      state.mass[h] += quad_sum(mass[h]);
      state.delta[h] = quad_sum(moment[h]) * rcp_approx(fmaxf(state.mass[h], kLeastMass));
      state.mean[h] += state.delta[h];
    }
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) b[n][e] = fmaf(-state.delta[e / 2], s[n][e], b[n][e]);
    }
  }
  // Moves the sums over the tiles before. If there are none, x and y are without meaning, and the
  // first tile's results will overwrite them.
  __device__ void move_sums() {
#pragma unroll
    for (int n = 0; n < C::kOutTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) y[n][e] = fmaf(-state.delta[e / 2], x[n][e], y[n][e]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) r[e] = fmaf(-state.delta[e / 2], l[e], r[e]);
  }
  __device__ void pack() {
#pragma unroll
    for (int i = 0; i < C::kDepths; ++i) {
      weights[i] = E::pack_a(s + 2 * i);
      derivatives[i] = E::pack_a(b + 2 * i);
    }
  }

  // As in attention_backward_queries: turns Z into the gradient.
  template <class Launch>
  __device__ void finish_queries(const Launch& p, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float moved = p.scale * shuffle_idx(given, (lane & ~3) + 2 + h);
      const float share = rcp_approx(l[2 * h]), back = fmaf(-r[2 * h], share, moved);
#pragma unroll
      for (int n = 0; n < C::kOutTiles; ++n) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          y[n][e] = l[2 * h] == 0.0f ? 0.0f : share * fmaf(back, x[n][e], y[n][e]);
        }
      }
    }
  }

 private:
  // As weigh(), but raises the maximum of S first, and with it the sums so far.
  template <bool kFirst, class Launch>
  __device__ void search(const Launch& p) {
    if (!kFirst) {
      wgmma_wait<0>();
      hold_results();
    }
    const float before[2] = {state.top[0], state.top[1]};
    raise(state, s);
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      base[h] = state.top[h] == -INFINITY ? 0.0f : state.top[h];
      if constexpr (kFirst) continue;
      const float shrink = exp2_approx(p.factor * (before[h] - base[h]));
      state.mass[h] *= shrink;
      l[2 * h] *= shrink, r[2 * h] *= shrink;
#pragma unroll
      for (int n = 0; n < C::kOutTiles; ++n) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) x[n][e] *= shrink, y[n][e] *= shrink;
      }
    }
    weigh(p, [&](float x, int h) { return p.factor * (x - base[h]); });
  }
  // Turns S into e, given its exponents, and B into H about the mean of the tiles before, as that
  // of this one is known only at the end.
  template <class Launch, class Exponent>
  __device__ void weigh(const Launch& p, Exponent exponent) {
    mass[0] = mass[1] = moment[0] = moment[1] = 0.0f;
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[n][e] = exp2_approx(exponent(s[n][e], e / 2));
        b[n][e] = s[n][e] * fmaf(p.scale, b[n][e], -state.mean[e / 2]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {  // in pairs, for shorter chains
        mass[h] += s[n][2 * h] + s[n][2 * h + 1];
        moment[h] += b[n][2 * h] + b[n][2 * h + 1];
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
  using T = typename C::T;
  constexpr bool kByKeys = C::kByKeys;
  constexpr int kStride = C::kColumns;
  const uint32_t rows = at.rows(c);
  uint32_t rows_parity = 0;
  RingPlace<C::kSlots> place;
  HopperBackwardUnit<C> unit;
  int i = 0;
  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x), ++i) {
    const HopperItem here = hopper_item<C>(p, item);
    const HopperShare share = hopper_share<C>(p, here, c, i);
    if (share.count == 0) skip_tiles(p, at, place, lane);
    for (int r = 0; r < share.count; ++r) {
      const bool last = r + 1 == share.count;
      if (r > 0) place = place.before(p.tiles);
      const int row = (here.first + share.turn + r * C::kConsumers) * kRowBlock +
                      thread / kWarpThreads * 16 + (lane >> 2);
      const float given = kByKeys ? 0.0f : known(p, here, row, p.rows, lane);
      mbarrier_wait(at.rows_full(c), rows_parity);
      mbarrier_wait(at.full(place.slot), place.parity);
      unit.hold_scores();
      wgmma_fence();
      unit.multiply_scores(rows, at.tile(place.slot));
      wgmma_commit();
      wgmma_wait<0>();
      unit.hold_scores();
      if (p.tiles == 1) release(at.rows_empty(c));
      if constexpr (!kByKeys) unit.expect(given, lane);
      unit.template differentiate<kByKeys, true>(p, p.columns, at.statistics(place.slot), kStride,
                                                 lane);
      if constexpr (!kByKeys) unit.move_mean();
      unit.pack();
#pragma unroll 1
      for (int j = 1; j < p.tiles; ++j) {
        const RingPlace<C::kSlots> next = place.next();
        mbarrier_wait(at.full(next.slot), next.parity);
        unit.hold_scores();
        wgmma_fence();
        unit.multiply_scores(rows, at.tile(next.slot));
        wgmma_commit();
        unit.hold_results();
        if constexpr (!kByKeys) unit.add_up();
        wgmma_fence();
        unit.template multiply_results<kByKeys>(at.tile(place.slot), j == 1);
        wgmma_commit();
        wgmma_wait<1>();
        unit.hold_scores();
        if (j + 1 == p.tiles) release(at.rows_empty(c));
        unit.template differentiate<kByKeys, false>(p, p.columns - j * C::kColumns,
                                                    at.statistics(next.slot), kStride, lane);
        unit.hold_scores();
        wgmma_wait<0>();
        unit.hold_results();
        if (last) release(at.empty(place.slot));
        if constexpr (!kByKeys) {
          unit.move_mean();
          unit.move_sums();
        }
        unit.pack();
        place = next;
      }
      rows_parity ^= 1;
      unit.hold_results();
      if constexpr (!kByKeys) unit.add_up();
      wgmma_fence();
      unit.template multiply_results<kByKeys>(at.tile(place.slot), p.tiles == 1);
      wgmma_commit();
      wgmma_wait<0>();
      unit.hold_results();
      if (last) release(at.empty(place.slot));
      place = place.next();
      if constexpr (kByKeys) {
        store_gradient<T>(unit.x, p.gradient[0], here, row, p.rows, lane);
      } else {
        unit.store_statistics(p, statistics_of<C>(p, here), p.padded_queries, row, p.rows, lane);
        unit.finish_queries(p, lane);
      }
      store_gradient<T>(unit.y, p.gradient[C::kByKeys], here, row, p.rows, lane);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(3 * kGroupThreads, 1)
    hopper_backward_kernel(const __grid_constant__ HopperBackward p) {
  hopper_backward_block<C>(p,
                           [&](const HopperBackwardPlaces<C>& at, int c) { consume<C>(p, at, c); });
}

}  // namespace pmf::cuda
