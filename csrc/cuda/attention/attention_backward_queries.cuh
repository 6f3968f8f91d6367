// Gradient of the queries for the ordinary backward, and the row statistics that
// attention_backward_keys needs.
//
//   S = c Q K^T   P = softmax(S)   B = G V^T   D = rowsum(P o B)
//   grad_query = c (P o (B - D)) K
//
// This is the tangent of attention with B in place of the scores' tangent and K in place of the
// values. So a single sweep over the keys computes it, D included, like the forward's tangent
// (attention_softmax.cuh): with e = 2^(S - top), and the running mean D of c B as pivot,
//
//   H = e o (c B - D)    M += e K    Z += H K    l += rowsum(e)    r += rowsum(H)
//   grad_query = (Z - (r / l) M) / l
//
// where e and H are rounded as the products read them and l and r sum the rounded values; whenever
// D moves by delta, Z -= delta M and r -= delta l. The rounding error in the row sums is thus
// removed along the row's own mean key M / l. D sums unrounded terms: it is exact to fp32 and does
// not need the forward's outputs. A gradient g of lse adds c g M / l to grad_query, and the keys
// receive c (D - g) in place of c D.
//
// Tiling: a block owns 16 `warps` queries, with their Q and G in shared memory; K and V stream
// through a three-slot ring in tiles of kColumns keys. Six warps and 32 columns pad 276 x 276 to
// 288 x 288. Bytes: Q, K, V, G read and grad_query written once; K and V again per block, from L2.
// FLOPs: 4 products, 2 Nq Nk D each. Shared memory: 32 ldmatrix.x4 of 4 cycles per 64 mma, per warp
// and tile at width 64. Bound (estimated): about equally by shared memory and the tensor cores.
#pragma once

#include "cuda/attention/attention_backward.cuh"

namespace pmf::cuda {

// The state of a lane's rows g and g + 8.
struct MovingMean {
  float top[2] = {-INFINITY, -INFINITY};
  float mass[2] = {0.0f, 0.0f};  // sum e, unrounded
  float mean[2] = {0.0f, 0.0f};  // D
  float shrink[2],
      delta[2];  // set by raise() and advance(): factor of all sums, change of the mean
};

// Raises the maximum to that of a tile's scores.
template <int kTiles>
__device__ inline void raise(MovingMean& state, const float (&s)[kTiles][4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float peak = s[0][2 * h];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) peak = fmaxf(peak, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
    const float now = fmaxf(state.top[h], quad_max(peak));
    state.shrink[h] = exp2_approx(state.top[h] - (now == -INFINITY ? 0.0f : now));
    state.top[h] = now;
  }
}

// Turns a tile's scores into e and its products b into H.
template <int kTiles>
__device__ inline void advance(MovingMean& state, float (&s)[kTiles][4], float (&b)[kTiles][4],
                               float scale) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float base = state.top[h] == -INFINITY ? 0.0f : state.top[h];
    float sum = 0.0f, moment = 0.0f;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        s[j][e] = exp2_approx(s[j][e] - base);
        sum += s[j][e];
        moment = fmaf(s[j][e], fmaf(scale, b[j][e], -state.mean[h]), moment);
      }
    }
    state.mass[h] = fmaf(state.mass[h], state.shrink[h], quad_sum(sum));
    moment = quad_sum(moment);
    state.delta[h] = state.mass[h] == 0.0f ? 0.0f : moment * rcp_approx(state.mass[h]);
    state.mean[h] += state.delta[h];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        b[j][e] = s[j][e] * fmaf(scale, b[j][e], -state.mean[h]);
      }
    }
  }
}

// Applies the new maximum and mean to the accumulators m = sum e K and z = sum H K.
template <int kTiles>
__device__ inline void follow(const MovingMean& state, float (&m)[kTiles][4],
                              float (&z)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float moved = m[n][e] * state.shrink[e / 2];
      z[n][e] = fmaf(-state.delta[e / 2], moved, z[n][e] * state.shrink[e / 2]);
      m[n][e] = moved;
    }
  }
}

template <typename E, int kWidth, int kOut, int kColumns, bool kRegular, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    attention_backward_queries(const __grid_constant__ AttentionBackwardParams p,
                               const __grid_constant__ BackwardPlan plan) {
  using T = typename E::Storage;
  using Tile = SharedTile<T, kWidth>;
  constexpr int kTiles = kColumns / 8, kOutTiles = kOut / 8, kTensors = 2;
  using Tiles = BlockTiles<T, kWidth, kTensors, kColumns>;

  const AttentionShape& shape = p.shape;
  const int rows = plan.rows;
  auto& place = place_block<kTensors, false>(p, plan, kOut);
  const Sequence& sequence = place.sequence;
  if (place.first >= sequence.queries) return;
  const int column = kRegular ? 0 : place.column, first = place.first;

  const int thread = threadIdx.x, warp = thread / kWarpThreads, lane = thread % kWarpThreads;
  const int g = lane >> 2, t = lane & 3;
  const int own = warp * kWarpRows;  // this warp's first row within the block
  const int query = first + own;
  const bool idle = query >= sequence.queries;
  const int width = kRegular ? kWidth : int(shape.width);
  const int value_width = kRegular ? kWidth : int(shape.value_width);

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

  MovingMean state;
  float m[kOutTiles][4], z[kOutTiles][4];  // sum e K and sum H K
  float sums[4] = {};                      // l and r of row g, then of row g + 8
  clear(m);
  clear(z);

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
  const auto consume = [&](int i, int slot) {
    const int key = seen.begin + i * kColumns;
    const Tile k_tile = tiles.streamed(slot, kK), v_tile = tiles.streamed(slot, kV);
    bool hides = false;
    if (!kRegular &&
        (p.mask.kind != MaskKind::none || crosses(plan.window, first, rows, key, kColumns))) {
      hides =
          any_not_finite(k_tile.at(0, 0), kColumns * kWidth, place.found, thread, int(blockDim.x));
    }
    if (idle) return;
    if (!kRegular && outside(plan.window, query, kWarpRows, key, kColumns)) return;
    float s[kTiles][4], b[kTiles][4];
    clear(s);
    clear(b);
    multiply_across<E, false, kRegular>(s, tiles.own(kQ, own), 0, k_tile, width, lane);
    multiply_across<E, false, kRegular>(b, tiles.own(kG, own), 0, v_tile, value_width, lane);
    const bool edge = (i + 1 == count && key + kColumns > sequence.keys) ||
                      (!kRegular && crosses(plan.window, query, kWarpRows, key, kColumns));
    finish_scores<false, kRegular>(s, p, plan, sequence,
                                   {place.batch, place.head, query + g, key + 2 * t}, edge, b);
    raise(state, s);
    advance(state, s, b, scale);
    follow(state, m, z);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float &l = sums[2 * h], &r = sums[2 * h + 1];
      l *= state.shrink[h];
      r = fmaf(-state.delta[h], l, r * state.shrink[h]);
    }
#pragma unroll
    for (int k = 0; k < kTiles / E::kTilesPerA; ++k) {
      add_row_sums<E>(sums, E::pack_a(s + k * E::kTilesPerA), E::pack_a(b + k * E::kTilesPerA),
                      lane);
    }
    if (!kRegular && hides) {
      multiply_down<E, true, kRegular>(k_tile, column, width, lane, down(m, s), down(z, b));
    } else {
      multiply_down<E, false, kRegular>(k_tile, column, width, lane, down(m, s), down(z, b));
    }
  };
  stream<kRegular>(count, plan.slots, issue, consume);

  bool nothing[2];
  float moved[2] = {};  // c times the gradient of lse
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = query + g + 8 * h;
    nothing[h] = state.mass[h] == 0.0f || row >= sequence.queries;
    if (p.grad_lse != nullptr && row < sequence.queries) {
      const auto at = statistic_row(shape, place.batch, place.head, sequence, row);
      moved[h] = scale * lse_gradient(p.grad_lse, at);
    }
    // A query without a gradient may be padding, of arbitrary contents: it contributes nothing.
    if (!kRegular) {
      const bool still = zero_row(tiles.own(kG, own), g + 8 * h, lane);
      nothing[h] = (still && moved[h] == 0.0f) || nothing[h];
    }
  }
  if (column == 0 && t == 0) {
    const auto at = [&](int which) {
      return statistic_of<false>(plan, shape, sequence, place.batch, place.head, which);
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = query + g + 8 * h;
      at(kTop)[row] = nothing[h] ? INFINITY : state.top[h];
      at(kWeight)[row] = nothing[h] ? 0.0f : rcp_approx(state.mass[h]);
      at(kD)[row] = nothing[h] ? 0.0f : state.mean[h] - moved[h];
    }
  }
#pragma unroll
  for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float l = sums[e / 2 * 2], r = sums[e / 2 * 2 + 1];
      const float share = l == 0.0f ? 0.0f : rcp_approx(l);
      z[n][e] =
          nothing[e / 2] ? 0.0f : share * fmaf(fmaf(-r, share, moved[e / 2]), m[n][e], z[n][e]);
    }
  }
  write_gradient(z, tiles.own(kQ, own), 0, p.grad_query, place.batch, place.head, sequence.query,
                 query, sequence.queries, column, width, lane);
}

}  // namespace pmf::cuda
