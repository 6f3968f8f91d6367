// Gradients of the queries and their tangents for the backward through both outputs of attention
// with tangents, and the row statistics that attention_backward_keys needs.
//
//   S = c Q K^T   P = softmax(S)   tS = tQ K^T + Q tK^T   A = X V^T   B = G V^T + X tV^T
//   r = rowsum(P o c tS)   a = rowsum(P o A)   D = rowsum(P o (B + (c tS - r) o (A - a)))
//   c dtS = c P o (A - a)  c dS = c P o (B + (c tS - r) o (A - a) - D)
//   grad_query = c (dS K + dtS tK)             grad_query_t = c dtS K
//
// Two sweeps over the keys. The first computes the statistics: sums about pivots (the row's values
// at its first key), in each lane relative to its own maximum and merged at the end; the product in
// D too uses its pivots, as mean(tau alpha) - mean(tau) mean(alpha). The second forms the
// derivatives. Their rows should sum to zero but, rounded, sum to rho and rho_t. That error is
// along the row's mean key, so grad_query -= rho M + rho_t tM and grad_query_t -= rho_t M, where M
// = P K and tM = P tK.
//
// Correct for every width, not tuned: 6 products twice and 5 more. Gradient columns beyond kOut go
// to further blocks, which recompute the scores.
#pragma once

#include "cuda/attention/attention_backward.cuh"

namespace pmf::cuda {

// A row's sums over the keys that one lane has seen.
struct RowMoments {
  float top = -INFINITY, mass = 0.0f;
  float tau = 0.0f, alpha = 0.0f, beta = 0.0f;  // sums of c tS, A, B + (c tS) A about pivots

  __device__ void scale(float factor) {
    mass *= factor, tau *= factor, alpha *= factor, beta *= factor;
  }
  // Merges the four lanes of a row.
  __device__ void merge() {
    const float now = quad_max(top);
    scale(exp2_approx(top - (now == -INFINITY ? 0.0f : now)));
    top = now;
    mass = quad_sum(mass), tau = quad_sum(tau), alpha = quad_sum(alpha), beta = quad_sum(beta);
  }
};

template <typename E, int kWidth, int kOut, int kColumns, bool kRegular, int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_tangents(const __grid_constant__ AttentionBackwardParams p,
                                const __grid_constant__ BackwardPlan plan) {
  using T = typename E::Storage;
  using Tile = SharedTile<T, kWidth>;
  constexpr int kTiles = kColumns / 8, kOutTiles = kOut / 8, kTensors = 4;
  using Tiles = BlockTiles<T, kWidth, kTensors, kColumns>;

  const AttentionShape& shape = p.shape;
  const int rows = plan.rows;
  auto& place = place_block<kTensors, false>(p, plan, kOut);
  const Sequence& sequence = place.sequence;
  if (place.first >= sequence.queries) return;
  const int column = place.column, first = place.first;

  const int thread = threadIdx.x, warp = thread / kWarpThreads, lane = thread % kWarpThreads;
  const int g = lane >> 2, t = lane & 3;
  const int own = warp * kWarpRows;
  const int query = first + own;
  const bool idle = query >= sequence.queries;
  const int width = kRegular ? kWidth : int(shape.width);
  const int value_width = kRegular ? kWidth : int(shape.value_width);
  const bool has_g = kRegular || p.grad.data != nullptr;
  const bool has_qt = kRegular || p.query_t.data != nullptr;
  const bool has_kt = kRegular || p.key_t.data != nullptr;
  const bool has_vt = kRegular || p.value_t.data != nullptr;
  const bool wants_t = kRegular || p.grad_query_t.data != nullptr;

  const Tiles tiles = {reinterpret_cast<T*>(dynamic_shared() + kBackwardPlaceBytes), rows};
  Tiles::template load<kRegular>(
      tiles.own(kQ), rows, [&](int i) -> const ConstView4& { return query_side(p, i); },
      place.batch, place.head, sequence.query, first, sequence.queries, shape);
  if (kRegular && thread < kTensors) {
    const WholeHead head =
        whole_head_of<T>(key_side(p, thread), place.batch, place.key_head, sequence.key);
    place.streamed[thread] = head;
  }
  __syncthreads();

  const RowRange seen = seen_keys<kRegular, kColumns>(plan, sequence, first);
  const int count = (seen.end - seen.begin + kColumns - 1) / kColumns;
  const float& scale = plan.scale;
  const auto issue = [&](int i, int slot) {
    const Tile tile = tiles.streamed(slot, kK);
    if constexpr (kRegular) {
      load_whole_rows<kTensors, 1>(tile, kColumns, place.streamed, seen.begin + i * kColumns,
                                   sequence.keys, thread, int(blockDim.x));
    } else {
      Tiles::template load<false>(
          tile, kColumns, [&](int x) -> const ConstView4& { return key_side(p, x); }, place.batch,
          place.key_head, sequence.key, seen.begin + i * kColumns, sequence.keys, shape);
    }
  };

  RowMoments moments[2];
  float tau_pivot[2] = {}, alpha_pivot[2] = {}, beta_pivot[2] = {};
  float d[2], a_mean[2], r_mean[2], weight[2];

  // Computes a tile's scores in log-2 units, tS, A and B.
  const auto products = [&](int i, int slot, float (&s)[kTiles][4], float (&ts)[kTiles][4],
                            float (&a)[kTiles][4], float (&b)[kTiles][4]) {
    clear(s);
    clear(ts);
    clear(a);
    clear(b);
    multiply_across<E, false, kRegular>(s, ts, tiles.own(kQ, own), tiles.own(kQT, own), has_qt, 0,
                                        tiles.streamed(slot, kK), tiles.streamed(slot, kKT), has_kt,
                                        width, lane);
    multiply_across<E, false, kRegular>(a, b, tiles.own(kX, own), tiles.own(kG, own), has_g, 0,
                                        tiles.streamed(slot, kV), tiles.streamed(slot, kVT), has_vt,
                                        value_width, lane);
    const int key = seen.begin + i * kColumns;
    const bool edge = (i + 1 == count && key + kColumns > sequence.keys) ||
                      (!kRegular && crosses(plan.window, query, kWarpRows, key, kColumns));
    finish_scores<false, kRegular>(
        s, p, plan, sequence, {place.batch, place.head, query + g, key + 2 * t}, edge, ts, a, b);
  };

  // Whether this warp's queries see no key of the tile.
  const auto passes = [&](int i) {
    if constexpr (kRegular) return idle;
    return idle || outside(plan.window, query, kWarpRows, seen.begin + i * kColumns, kColumns);
  };

  bool fresh = true;
  const auto measure = [&](int i, int slot) {
    float s[kTiles][4], ts[kTiles][4], a[kTiles][4], b[kTiles][4];
    products(i, slot, s, ts, a, b);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      RowMoments& row = moments[h];
      if (kRegular ? i == 0 : fresh) {
        const int from = lane & ~3;
        tau_pivot[h] = shuffle_idx(ts[0][2 * h], from);
        alpha_pivot[h] = shuffle_idx(a[0][2 * h], from);
        beta_pivot[h] = shuffle_idx(b[0][2 * h], from);
      }
      float top = row.top;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) top = fmaxf(top, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
      const float base = top == -INFINITY ? 0.0f : top;
      row.scale(exp2_approx(row.top - base));
      row.top = top;
      RowMoments part;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          const float x = exp2_approx(s[j][e] - base);
          const float tau = scale * (ts[j][e] - tau_pivot[h]), alpha = a[j][e] - alpha_pivot[h];
          part.mass += x;
          part.tau = fmaf(x, tau, part.tau);
          part.alpha = fmaf(x, alpha, part.alpha);
          part.beta = fmaf(x, fmaf(tau, alpha, b[j][e] - beta_pivot[h]), part.beta);
        }
      }
      row.mass += part.mass, row.tau += part.tau, row.alpha += part.alpha, row.beta += part.beta;
    }
    fresh = false;
  };

  // Gradients of lse (g) and lse_t (y) for row g + 8 h. With them, rows of dtS sum to y and those
  // of dS to g; D becomes D - g and a becomes a - y.
  struct LseGradients {
    float value, tangent;
  };
  const auto lse_gradients = [&](int h) -> LseGradients {
    const int at = query + g + 8 * h;
    if ((p.grad_lse == nullptr && p.grad_lse_t == nullptr) || at >= sequence.queries)
      return {0.0f, 0.0f};
    const auto row = statistic_row(shape, place.batch, place.head, sequence, at);
    return {lse_gradient(p.grad_lse, row), lse_gradient(p.grad_lse_t, row)};
  };

  const auto conclude = [&] {
    const auto of = [&](int which) {
      return statistic_of<true>(plan, shape, sequence, place.batch, place.head, which);
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      RowMoments& row = moments[h];
      row.merge();
      weight[h] = row.mass == 0.0f ? 0.0f : 1.0f / row.mass;
      const float tau = row.tau * weight[h], alpha = row.alpha * weight[h];
      r_mean[h] = fmaf(scale, tau_pivot[h], tau);
      a_mean[h] = alpha_pivot[h] + alpha;
      d[h] = scale * (beta_pivot[h] + fmaf(row.beta, weight[h], -tau * alpha));
      const int at = query + g + 8 * h;
      bool nothing = row.mass == 0.0f || at >= sequence.queries;
      const LseGradients lse = lse_gradients(h);
      if (!kRegular) {
        // A query without gradients may be padding, of arbitrary contents: it contributes nothing.
        const bool still = !has_g || zero_row(tiles.own(kG, own), g + 8 * h, lane);
        nothing = (zero_row(tiles.own(kX, own), g + 8 * h, lane) && still && lse.value == 0.0f &&
                   lse.tangent == 0.0f) ||
                  nothing;
      }
      d[h] = fmaf(-scale, lse.value, d[h]);
      a_mean[h] -= lse.tangent;
      if (nothing) row.top = INFINITY, weight[h] = d[h] = a_mean[h] = r_mean[h] = 0.0f;
      if (column != 0 || t != 0) continue;
      of(kTop)[at] = row.top;
      of(kWeight)[at] = weight[h];
      of(kD)[at] = d[h];
      of(kA)[at] = a_mean[h];
      of(kR)[at] = r_mean[h];
    }
  };

  stream<kRegular>(count, plan.slots, issue, [&](int i, int slot) {
    if (!passes(i)) measure(i, slot);
  });
  conclude();

  float dq[kOutTiles][4], dqt[kOutTiles][4], mean[kOutTiles][4], mean_t[kOutTiles][4];
  float sums[4] = {};  // rho and rho_t of row g, then of row g + 8
  clear(dq);
  clear(dqt);
  clear(mean);
  clear(mean_t);
  const auto differentiate = [&](int i, int slot, bool hides) {
    float s[kTiles][4], ts[kTiles][4], a[kTiles][4], b[kTiles][4];
    products(i, slot, s, ts, a, b);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int h = e / 2;
        s[j][e] = exp2_approx(s[j][e] - moments[h].top) * weight[h];
        if (!kRegular && weight[h] == 0.0f) s[j][e] = ts[j][e] = a[j][e] = b[j][e] = 0.0f;
        const float centred = a[j][e] - a_mean[h];
        const float tangent = fmaf(scale, ts[j][e], -r_mean[h]);
        b[j][e] = s[j][e] * fmaf(scale, fmaf(tangent, centred, b[j][e]), -d[h]);
        a[j][e] = s[j][e] * (scale * centred);
      }
    }
#pragma unroll
    for (int k = 0; k < kTiles / E::kTilesPerA; ++k) {
      add_row_sums<E>(sums, E::pack_a(b + k * E::kTilesPerA), E::pack_a(a + k * E::kTilesPerA),
                      lane);
    }
    const Tile k_tile = tiles.streamed(slot, kK), kt_tile = tiles.streamed(slot, kKT);
    const auto add = [&](auto finite) {
      constexpr bool kFinite = decltype(finite)::value;
      if (wants_t) {
        multiply_down<E, kFinite, kRegular>(k_tile, column, width, lane, down(dq, b), down(mean, s),
                                            down(dqt, a));
      } else {
        multiply_down<E, kFinite, kRegular>(k_tile, column, width, lane, down(dq, b),
                                            down(mean, s));
      }
      if (has_kt) {
        multiply_down<E, kFinite, kRegular>(kt_tile, column, width, lane, down(dq, a),
                                            down(mean_t, s));
      }
    };
    if (!kRegular && hides) {
      add(std::true_type{});
    } else {
      add(std::false_type{});
    }
  };

  stream<kRegular>(count, plan.slots, issue, [&](int i, int slot) {
    const int key = seen.begin + i * kColumns;
    bool hides = false;
    if (!kRegular &&
        (p.mask.kind != MaskKind::none || crosses(plan.window, first, rows, key, kColumns))) {
      const Tile from = tiles.streamed(slot, kK);
      hides = any_not_finite(from.at(0, 0), (has_kt ? kKT + 1 : kV + 1) * kColumns * kWidth,
                             place.found, thread, int(blockDim.x));
    }
    if (!passes(i)) differentiate(i, slot, hides);
  });

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (weight[h] == 0.0f) continue;
    const LseGradients lse = lse_gradients(h);
    sums[2 * h] = fmaf(-scale, lse.value, sums[2 * h]);
    sums[2 * h + 1] = fmaf(-scale, lse.tangent, sums[2 * h + 1]);
  }
#pragma unroll
  for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float rho = sums[e / 2 * 2], rho_t = sums[e / 2 * 2 + 1];
      dq[n][e] -= fmaf(rho, mean[n][e], rho_t * mean_t[n][e]);
      dqt[n][e] = fmaf(-rho_t, mean[n][e], dqt[n][e]);
    }
  }
  write_gradient(dq, tiles.own(kQ, own), 0, p.grad_query, place.batch, place.head, sequence.query,
                 query, sequence.queries, column, width, lane);
  if (p.grad_query_t.data != nullptr) {
    write_gradient(dqt, tiles.own(kQT, own), 0, p.grad_query_t, place.batch, place.head,
                   sequence.query, query, sequence.queries, column, width, lane);
  }
}

}  // namespace pmf::cuda
