// Attention backward through both outputs with Hopper instructions: the mathematics of
// attention_backward_tangents.cuh, then that of attention_backward_keys.cuh, with S, U, A, B and u
// as there but for the scale, which U lacks here.
//
// Three launches, all of them hopper_backward_block() with four tensors on either side: tiles of
// kColumns keys (or queries) stream past row blocks of 64 queries (or keys).
//
//   measures   S = Q K^T   U = tQ K^T + Q tK^T   A = X V^T   B = G V^T + X tV^T   the statistics
//   queries    the same     dQ += dS K + dtS tK    dtQ += dtS K    M += P K    tM += P tK
//   keys       transposed   dK += dS^T Q + dtS^T tQ    dtK += dtS^T Q
//                           dV += P^T G + (P o u)^T X  dtV += P^T X
//
// Within a consumer, products and the arithmetic between them alternate: while one computes, the
// other multiplies. Queueing the next tile's products ahead would take more registers than there
// are; in keys S, U, A, B take 64 x kColumns each and the four sums 64 x kWidth: 192 per thread at
// 32 columns.
//
// FLOPs: 6 products to measure, 11 for queries, 12 for keys, 2 Nq Nk D each; 15 would do in one
// pass with atomics. Bytes: each launch reads eight tensors, and the last two write six gradients.
// Bound: the tensor cores, or rather the shared memory that feeds them: products of 32 columns
// take half as long again as their share of the tensor cores.
#pragma once

#include "cuda/attention/hopper_backward_block.cuh"

namespace pmf::cuda {

constexpr int kTangentSides = 4;  // QuerySide, KeySide

template <typename T, int kWidth, int kColumns, int kSlots, bool kByKeys, bool kMeasures_>
struct HopperTangentSizes
    : HopperBackwardSizes<T, kWidth, kColumns, kSlots, kByKeys, kTangentSides> {
  static constexpr bool kMeasures = kMeasures_;
  static_assert(!kMeasures || !kByKeys, "statistics are those of queries");
};

// What is summed over a tile of either side, queries as rows or, if C::kByKeys, keys.
template <class C>
struct HopperTangentScores {
  float s[C::kTiles][4], u[C::kTiles][4], a[C::kTiles][4], b[C::kTiles][4];

  __device__ void hold_all() {
    hold(s);
    hold(u);
    hold(a);
    hold(b);
  }
  // Terms are added in an order that does not depend on kByKeys.
  __device__ void multiply(uint32_t rows, uint32_t tile) {
    add<kQ, kK>(s, rows, tile, false);
    add<kQT, kK>(u, rows, tile, false);
    add<kQ, kKT>(u, rows, tile, true);
    add<kX, kV>(a, rows, tile, false);
    add<kG, kV>(b, rows, tile, false);
    add<kX, kVT>(b, rows, tile, true);
  }

 private:
  template <int kOfQueries, int kOfKeys>
  __device__ void add(float (&sums)[C::kTiles][4], uint32_t rows, uint32_t tile, bool adds) {
    wgmma_across<C, C::kByKeys ? kOfKeys : kOfQueries, C::kByKeys ? kOfQueries : kOfKeys>(
        sums, rows, tile, adds);
  }
};

// Where a lane is: its row g of a row block of a head, with row g + 8 below it.
struct HopperLane {
  HopperItem here;
  int row, lane;
};

// The gradient of lse or lse_t of row g + 8 h; a null pointer means zero.
template <class Launch>
__device__ inline float lse_gradient_of(const Launch& p, const float* from, const HopperLane& at,
                                        int h) {
  const int row = at.row + 8 * h;
  if (from == nullptr || row >= p.rows) return 0.0f;
  return from[(int64_t(at.here.batch) * p.heads + at.here.head) * p.rows + row];
}

// ---- statistics ---------------------------------------------------------------------------------

// A warp's 16 queries. As in attention_backward_tangents: sums relative to the largest score that a
// lane has seen, about the values at the row's first key. For the kernels that follow, kTop is a
// score without the scale, kWeight the logarithm of the weight and kA has the scale:
// P = 2^((S - top) factor + weight), of which the difference loses nothing where P matters.
template <class C>
struct HopperMeasures {
  HopperTangentScores<C> scores;
  float top[2], mass[2], tau[2], alpha[2], beta[2];
  float tau_pivot[2], alpha_pivot[2], beta_pivot[2];

  template <class Launch>
  __device__ void begin(const Launch&, const HopperLane&) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = -INFINITY;
      mass[h] = tau[h] = alpha[h] = beta[h] = 0.0f;
    }
  }

  template <class Launch>
  __device__ void take(const Launch& p, bool is_first, const HopperLane& at) {
    const float (&s)[C::kTiles][4] = scores.s;
    if (is_first) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int from = at.lane & ~3;
        tau_pivot[h] = p.scale * shuffle_idx(scores.u[0][2 * h], from);
        alpha_pivot[h] = shuffle_idx(scores.a[0][2 * h], from);
        beta_pivot[h] = shuffle_idx(scores.b[0][2 * h], from);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float now = top[h];
#pragma unroll
      for (int n = 0; n < C::kTiles; ++n) now = fmaxf(now, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      rise(p, h, now);
      const float base = now == -INFINITY ? 0.0f : now;
      float sums[4] = {};
#pragma unroll
      for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          const float x = exp2_approx(p.factor * (s[n][e] - base));
          const float of_tau = fmaf(p.scale, scores.u[n][e], -tau_pivot[h]);
          const float of_alpha = scores.a[n][e] - alpha_pivot[h];
          sums[0] += x;
          sums[1] = fmaf(x, of_tau, sums[1]);
          sums[2] = fmaf(x, of_alpha, sums[2]);
          sums[3] = fmaf(x, fmaf(of_tau, of_alpha, scores.b[n][e] - beta_pivot[h]), sums[3]);
        }
      }
      mass[h] += sums[0], tau[h] += sums[1], alpha[h] += sums[2], beta[h] += sums[3];
    }
  }

  template <class Launch>
  __device__ void finish(const Launch& p, const HopperLane& at) {
    float* const to = statistics_of<C>(p, at.here) + at.row;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rise(p, h, quad_max(top[h]));
      mass[h] = quad_sum(mass[h]), tau[h] = quad_sum(tau[h]);
      alpha[h] = quad_sum(alpha[h]), beta[h] = quad_sum(beta[h]);
      const bool nothing = mass[h] == 0.0f || at.row + 8 * h >= p.rows;
      const float share = nothing ? 0.0f : 1.0f / mass[h];
      const float mean_tau = tau[h] * share, mean_alpha = alpha[h] * share;
      const float d = beta_pivot[h] + fmaf(beta[h], share, -mean_tau * mean_alpha);
      const float g = lse_gradient_of(p, p.grad_lse, at, h);
      const float y = lse_gradient_of(p, p.grad_lse_t, at, h);
      if ((at.lane & 3) != 0) continue;
      const auto store = [&](Statistic which, float x) {
        to[which * p.padded_queries + 8 * h] = x;
      };
      store(kTop, nothing ? INFINITY : top[h]);
      store(kWeight, nothing ? 0.0f : -log2_approx(mass[h]));
      store(kD, nothing ? 0.0f : p.scale * (d - g));
      store(kA, nothing ? 0.0f : p.scale * (alpha_pivot[h] + mean_alpha - y));
      store(kR, nothing ? 0.0f : tau_pivot[h] + mean_tau);
    }
  }

 private:
  template <class Launch>
  __device__ void rise(const Launch& p, int h, float now) {
    const float shrink = exp2_approx(p.factor * (top[h] - (now == -INFINITY ? 0.0f : now)));
    mass[h] *= shrink, tau[h] *= shrink, alpha[h] *= shrink, beta[h] *= shrink;
    top[h] = now;
  }
};

// ---- gradients ----------------------------------------------------------------------------------

// The statistics of a lane's two queries: rows g and g + 8, or two neighbouring columns.
struct HopperFigures {
  float of[kStatistics<true>][2];
};

// A warp's 16 rows. x: dQ, dtQ, M, tM, or dK, dV, dtK, dtV.
template <class C>
struct HopperTangentUnit {
  using E = typename C::E;
  using T = typename C::T;

  HopperTangentScores<C> scores;
  FragmentA weights[C::kDepths], derivatives[C::kDepths], derivatives_t[C::kDepths];
  FragmentA tangents[C::kByKeys ? C::kDepths : 1];  // P o u
  float x[kTangentSides][C::kOutTiles][4];

  // For queries only.
  HopperFigures own;
  float sums[4];  // of rows of dS and dtS, rounded: of row g, then of row g + 8

  template <class Launch>
  __device__ void begin(const Launch& p, const HopperLane& at) {
    if constexpr (!C::kByKeys) {
      const float* const from = statistics_of<C>(p, at.here) + at.row;
#pragma unroll
      for (int i = 0; i < kStatistics<true>; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) own.of[i][h] = from[i * p.padded_queries + 8 * h];
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] = 0.0f;
    }
  }

  // Turns S, U, A, B of a tile into factors of its products. `statistics`: of the tile's queries.
  template <class Launch>
  __device__ void differentiate(const Launch& p, const float* statistics, int lane) {
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
      const HopperFigures figures = C::kByKeys ? figures_of(statistics + 8 * n, lane) : own;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const auto of = [&](Statistic which) {
          return figures.of[which][C::kByKeys ? e % 2 : e / 2];
        };
        const float weight = exp2_approx(fmaf(scores.s[n][e] - of(kTop), p.factor, of(kWeight)));
        const float tangent = fmaf(p.scale, scores.u[n][e], -of(kR));
        const float centred = fmaf(p.scale, scores.a[n][e], -of(kA));
        const float slope = fmaf(tangent, centred, fmaf(p.scale, scores.b[n][e], -of(kD)));
        scores.s[n][e] = weight, scores.u[n][e] = weight * tangent;
        scores.a[n][e] = weight * centred, scores.b[n][e] = weight * slope;
      }
    }
#pragma unroll
    for (int i = 0; i < C::kDepths; ++i) {
      weights[i] = E::pack_a(scores.s + 2 * i);
      if constexpr (C::kByKeys) tangents[i] = E::pack_a(scores.u + 2 * i);
      derivatives_t[i] = E::pack_a(scores.a + 2 * i);
      derivatives[i] = E::pack_a(scores.b + 2 * i);
    }
    if constexpr (!C::kByKeys) {
#pragma unroll
      for (int i = 0; i < C::kDepths; ++i) {
        add_row_sums<E>(sums, derivatives[i], derivatives_t[i], lane);
      }
    }
  }

  __device__ void hold_results() {
#pragma unroll
    for (int i = 0; i < kTangentSides; ++i) hold(x[i]);
#pragma unroll
    for (int i = 0; i < C::kDepths; ++i) {
      hold(weights[i].x);
      hold(derivatives[i].x);
      hold(derivatives_t[i].x);
      if constexpr (C::kByKeys) hold(tangents[i].x);
    }
  }

  // A row block's first tile overwrites the results of the row block before.
  __device__ void multiply_results(uint32_t tile, bool is_first) {
#pragma unroll
    for (int i = 0; i < C::kDepths; ++i) {
      const bool adds = !is_first || i > 0;
      if constexpr (C::kByKeys) {
        wgmma_down<C, kQ>(x[kK], derivatives[i], tile, i, adds);
        wgmma_down<C, kQT>(x[kK], derivatives_t[i], tile, i);
        wgmma_down<C, kG>(x[kV], weights[i], tile, i, adds);
        wgmma_down<C, kX>(x[kV], tangents[i], tile, i);
        wgmma_down<C, kQ>(x[kKT], derivatives_t[i], tile, i, adds);
        wgmma_down<C, kX>(x[kVT], weights[i], tile, i, adds);
      } else {
        wgmma_down<C, kK>(x[0], derivatives[i], tile, i, adds);
        wgmma_down<C, kKT>(x[0], derivatives_t[i], tile, i);
        wgmma_down<C, kK>(x[1], derivatives_t[i], tile, i, adds);
        wgmma_down<C, kK>(x[2], weights[i], tile, i, adds);
        wgmma_down<C, kKT>(x[3], weights[i], tile, i, adds);
      }
    }
  }

  template <class Launch>
  __device__ void finish(const Launch& p, const HopperLane& at) {
    if constexpr (!C::kByKeys) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float rho = fmaf(-p.scale, lse_gradient_of(p, p.grad_lse, at, h), sums[2 * h]);
        const float rho_t =
            fmaf(-p.scale, lse_gradient_of(p, p.grad_lse_t, at, h), sums[2 * h + 1]);
#pragma unroll
        for (int n = 0; n < C::kOutTiles; ++n) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            x[0][n][e] -= fmaf(rho, x[2][n][e], rho_t * x[3][n][e]);
            x[1][n][e] = fmaf(-rho_t, x[2][n][e], x[1][n][e]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < (C::kByKeys ? 4 : 2); ++i) {
      if (p.gradient[i].data == nullptr) continue;
      store_gradient<T>(x[i], p.gradient[i], at.here, at.row, p.rows, at.lane);
    }
  }

 private:
  __device__ static HopperFigures figures_of(const float* statistics, int lane) {
    HopperFigures figures;
#pragma unroll
    for (int i = 0; i < kStatistics<true>; ++i) {
      const float2 pair =
          *reinterpret_cast<const float2*>(statistics + i * C::kColumns + 2 * (lane & 3));
      figures.of[i][0] = pair.x, figures.of[i][1] = pair.y;
    }
    return figures;
  }
};

template <class C>
__device__ inline void consume_tangents(const typename C::Launch& p,
                                        const HopperBackwardPlaces<C>& at, int c) {
  const int thread = int(threadIdx.x) % kGroupThreads, lane = thread % kWarpThreads;
  const auto release = [&](uint32_t barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };
  const uint32_t rows = at.rows(c);
  uint32_t rows_parity = 0;
  RingPlace<C::kSlots> place;
  std::conditional_t<C::kMeasures, HopperMeasures<C>, HopperTangentUnit<C>> unit;
  int i = 0;
  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x), ++i) {
    const HopperItem here = hopper_item<C>(p, item);
    const HopperShare share = hopper_share<C>(p, here, c, i);
    if (share.count == 0) skip_tiles(p, at, place, lane);
    for (int r = 0; r < share.count; ++r, rows_parity ^= 1) {
      const bool last = r + 1 == share.count;
      if (r > 0) place = place.before(p.tiles);
      const int row = (here.first + share.turn + r * C::kConsumers) * kRowBlock +
                      thread / kWarpThreads * 16 + (lane >> 2);
      const HopperLane mine = {here, row, lane};
      unit.begin(p, mine);
      mbarrier_wait(at.rows_full(c), rows_parity);
#pragma unroll 1
      for (int j = 0; j < p.tiles; ++j, place = place.next()) {
        const uint32_t tile = at.tile(place.slot);
        mbarrier_wait(at.full(place.slot), place.parity);
        unit.scores.hold_all();
        wgmma_fence();
        unit.scores.multiply(rows, tile);
        wgmma_commit();
        wgmma_wait<0>();
        unit.scores.hold_all();
        if (j + 1 == p.tiles) release(at.rows_empty(c));
        if constexpr (!C::kByKeys) {
          const int left = p.columns - j * C::kColumns;
          if (left < C::kColumns) hide_past(unit.scores.s, 2 * (lane & 3), left);
        }
        if constexpr (C::kMeasures) {
          if (last) release(at.empty(place.slot));
          unit.take(p, j == 0, mine);
        } else {
          unit.differentiate(p, at.statistics(place.slot), lane);
          unit.hold_results();
          wgmma_fence();
          unit.multiply_results(tile, j == 0);
          wgmma_commit();
          wgmma_wait<0>();
          unit.hold_results();
          if (last) release(at.empty(place.slot));
        }
      }
      unit.finish(p, mine);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(3 * kGroupThreads, 1)
    hopper_backward_tangents_kernel(const __grid_constant__ HopperBackwardOf<kTangentSides> p) {
  hopper_backward_block<C>(
      p, [&](const HopperBackwardPlaces<C>& at, int c) { consume_tangents<C>(p, at, c); });
}

}  // namespace pmf::cuda
