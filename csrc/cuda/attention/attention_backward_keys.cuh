// Gradients of keys and values, from the row statistics that the query kernels computed.
//
//   S^T = c K Q^T   P^T = weight 2^(S^T - top)   B^T = V G^T
//   grad_value = P^T G                           grad_key = c (P o (B - D))^T Q
//
// and with tangents, u = c (K tQ^T + tK Q^T)^T - r, A' = X V^T - a, B' = B + X tV^T + u o A':
//
//   grad_value   = P^T G + (P o u)^T X           grad_key   = c dS^T Q + c dtS^T tQ
//   grad_value_t = P^T X                         grad_key_t = c dtS^T Q
//   c dS = P o (c B' - c D)                      c dtS = P o c A'
//
// Tiling: a block owns 16 `warps` keys, with their K and V in shared memory; the queries of every
// head of the group stream past in tiles of kColumns, so that the sum over the group is a plain
// loop and every sum has a fixed order. Score tiles are transposed, with keys as rows: a warp's own
// P^T and dS^T are the A operands of its gradients. Bytes: as attention_backward_queries with keys
// and queries exchanged, and two gradients written. FLOPs: 4 products (12 with tangents), 2 Nq Nk D
// each. Shared memory: 40 ldmatrix.x4 per 64 mma, per warp and tile at width 64. Bound equally by
// shared memory and the tensor cores.
#pragma once

#include "cuda/attention/attention_backward.cuh"

namespace pmf::cuda {

// Iterates over the query tiles of each head of the group, one head after another.
struct QueryTiles {
  int head, first, end, query;  // the head, its first query, its end, the current query

  __device__ void next(int columns) {
    query += columns;
    if (query < end) return;
    query = first;
    ++head;
  }
};

template <typename E, int kWidth, int kOut, int kColumns, bool kTangent, bool kRegular,
          int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    attention_backward_keys(const __grid_constant__ AttentionBackwardParams p,
                            const __grid_constant__ BackwardPlan plan) {
  using T = typename E::Storage;
  using Tile = SharedTile<T, kWidth>;
  constexpr int kTiles = kColumns / 8, kOutTiles = kOut / 8,
                kTangentTiles = kTangent ? kOutTiles : 2;
  constexpr int kTensors = kTangent ? 4 : 2;
  constexpr int kStats = kStatistics<kTangent>;
  using Tiles = BlockTiles<T, kWidth, kTensors, kColumns>;

  const AttentionShape& shape = p.shape;
  const int rows = plan.rows;
  auto& place = place_block<kTensors, true>(p, plan, kOut);
  const Sequence& sequence = place.sequence;
  if (place.first >= sequence.keys) return;
  const int column = kRegular && kOut == kWidth ? 0 : place.column, first = place.first;
  const int group = kRegular ? 1 : int(shape.heads / shape.key_heads);
  const int all_keys = sequence.keys;

  const int thread = threadIdx.x, warp = thread / kWarpThreads, lane = thread % kWarpThreads;
  const int g = lane >> 2, t = lane & 3;
  const int own = warp * kWarpRows;
  const int key = first + own;
  const int width = kRegular ? kWidth : int(shape.width);
  const int value_width = kRegular ? kWidth : int(shape.value_width);
  const bool has_g = !kTangent || kRegular || p.grad.data != nullptr;
  const bool has_qt = kTangent && (kRegular || p.query_t.data != nullptr);
  const bool has_kt = kTangent && (kRegular || p.key_t.data != nullptr);
  const bool has_vt = kTangent && (kRegular || p.value_t.data != nullptr);

  // Shared memory layout: the block's own tiles, the ring buffer, then the slots' statistics.
  const Tiles tiles = {reinterpret_cast<T*>(dynamic_shared() + kBackwardPlaceBytes), rows};
  const int slots = kRegular ? kBackwardRegularSlots : plan.slots;
  float* const statistics =
      reinterpret_cast<float*>(tiles.ring() + slots * kTensors * kColumns * kWidth);
  Tiles::template load<kRegular>(
      tiles.own(kK), rows, [&](int i) -> const ConstView4& { return key_side(p, i); }, place.batch,
      place.head, sequence.key, first, all_keys, shape);
  if (kRegular && thread < kTensors) {
    const WholeHead head =
        whole_head_of<T>(query_side(p, thread), place.batch, place.head * group, sequence.query);
    place.streamed[thread] = head;
    if (thread == 0) {
      place.statistics = statistic_of<kTangent>(plan, shape, sequence, place.batch, place.head, 0);
    }
  }
  __syncthreads();

  const float& scale = plan.scale;
  float dk[kOutTiles][4], dv[kOutTiles][4], dkt[kTangentTiles][4], dvt[kTangentTiles][4];
  clear(dk);
  clear(dv);
  clear(dkt);
  clear(dvt);

  // The queries that see any of the block's keys.
  RowRange seeing = {0, sequence.queries};
  if constexpr (!kRegular) {
    const int last = (first + rows < all_keys ? first + rows : all_keys) - 1;
    seeing = rows_in_window(first, last, plan.window.right, plan.window.left, seeing.end, kColumns);
  }
  const int per_head = (seeing.end - seeing.begin + kColumns - 1) / kColumns;
  const QueryTiles start = {place.head * group, seeing.begin, seeing.end, seeing.begin};
  QueryTiles copied = start, now = start;

  const auto issue = [&](int, int slot) {
    const Tile tile = tiles.streamed(slot, kQ);
    if constexpr (kRegular) {
      load_whole_rows<kTensors, 1>(tile, kColumns, place.streamed, copied.query, sequence.queries,
                                   thread, int(blockDim.x));
    } else {
      Tiles::template load<false>(
          tile, kColumns, [&](int x) -> const ConstView4& { return query_side(p, x); }, place.batch,
          copied.head, sequence.query, copied.query, sequence.queries, shape);
    }
    constexpr int kCopies = kColumns * int(sizeof(float)) / kChunkBytes;  // copies per statistic
    const auto copy = [&](int c, const float* head) {
      const int which = c / kCopies, part = c % kCopies * 4;
      cp_async_16(statistics + (slot * kStats + which) * kColumns + part,
                  head + (int64_t{which} * plan.padded_queries + (copied.query + part)));
    };
    if constexpr (kRegular && kWidth <= kTunedWidth) {  // wider kernels have no register to spare
      static_assert(kStats * kCopies <= kWarpThreads, "one warp copies them all");
      if (thread < kStats * kCopies) copy(thread, place.statistics);
    } else {
      const float* const head =
          statistic_of<kTangent>(plan, shape, sequence, place.batch, copied.head, 0);
      for (int c = thread; c < kStats * kCopies; c += int(blockDim.x)) copy(c, head);
    }
    copied.next(kColumns);
  };
  const auto consume = [&](int, int slot) {
    const QueryTiles at = now;
    now.next(kColumns);
    const Tile q = tiles.streamed(slot, kQ), grad = tiles.streamed(slot, kG);
    const Tile qt = tiles.streamed(slot, kQT), x = tiles.streamed(slot, kX);  // with tangents
    const bool may_hide = !kRegular && (p.mask.kind != MaskKind::none ||
                                        crosses(plan.window, at.query, kColumns, first, rows));
    bool hides = false;
    if (may_hide) {
      const auto look = [&](const Tile& tile) {
        hides = any_not_finite(tile.at(0, 0), kColumns * kWidth, place.found, thread,
                               int(blockDim.x)) ||
                hides;
        __syncthreads();  // before `found` is overwritten
      };
      look(q);
      if (has_g) look(grad);
      if (has_qt) look(qt);
      if (kTangent) look(x);
    }
    if (key >= all_keys) return;
    if (!kRegular && outside(plan.window, at.query, kColumns, key, kWarpRows)) return;
    float s[kTiles][4], b[kTiles][4];
    float u[kTangent ? kTiles : 1][4], a[kTangent ? kTiles : 1][4];
    clear(s);
    clear(b);
    if constexpr (kTangent) {
      clear(u);
      clear(a);
      multiply_across<E, true, kRegular>(s, u, tiles.own(kK, own), tiles.own(kKT, own), has_kt, 0,
                                         q, qt, has_qt, width, lane);
      multiply_across<E, true, kRegular>(a, b, tiles.own(kV, own), tiles.own(kVT, own), has_vt, 0,
                                         x, grad, has_g, value_width, lane);
    } else {
      multiply_across<E, true, kRegular>(s, tiles.own(kK, own), 0, q, width, lane);
      multiply_across<E, true, kRegular>(b, tiles.own(kV, own), 0, grad, value_width, lane);
    }
    const bool edge = !kRegular && crosses(plan.window, at.query, kColumns, key, kWarpRows);
    finish_scores<true, kRegular>(s, p, plan, sequence,
                                  {place.batch, at.head, at.query + 2 * t, key + g}, edge);

    const float* const row = statistics + slot * kStats * kColumns;
    const auto statistic = [&](int which, int j, int e) {
      return row[which * kColumns + 8 * j + 2 * t + e % 2];
    };
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float weight = statistic(kWeight, j, e);
        // A masked score has P = 0 regardless of the query's statistics.
        const bool hidden = !kRegular && (s[j][e] == -INFINITY || weight == 0.0f);
        s[j][e] = exp2_approx(s[j][e] - statistic(kTop, j, e)) * weight;
        if (hidden) s[j][e] = 0.0f;
      }
    }
    if (may_hide) {
      if constexpr (kTangent) {
        forget_hidden(s, b, u, a);
      } else {
        forget_hidden(s, b);
      }
      // An unmasked inf or NaN reaches the gradient of the values through P.
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[j][e] = fmaf(0.0f, b[j][e], s[j][e]);
          if constexpr (kTangent) s[j][e] = fmaf(0.0f, a[j][e], s[j][e]);
        }
      }
    }
    const auto add = [&](auto finite_only) {
      constexpr bool kFinite = decltype(finite_only)::value;
      const auto down_to = [&](const Tile& tile, int columns, const auto&... terms) {
        multiply_down<E, kFinite, kRegular>(tile, column, columns, lane, terms...);
      };
      if (has_g) down_to(grad, value_width, down(dv, s));
      if constexpr (kTangent) {
        const bool wants_vt = kRegular || p.grad_value_t.data != nullptr;
        const bool wants_kt = kRegular || p.grad_key_t.data != nullptr;
        float h[kTiles][4];  // P o u
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float centred = a[j][e] - statistic(kA, j, e);
            const float tangent = fmaf(scale, u[j][e], -statistic(kR, j, e));
            b[j][e] = fmaf(tangent, centred, b[j][e]);
            a[j][e] = s[j][e] * (scale * centred);
            h[j][e] = s[j][e] * tangent;
            u[j][e] = s[j][e] * fmaf(scale, b[j][e], -statistic(kD, j, e));
          }
        }
        if (may_hide) forget_hidden(s, a, h, u);
        if (wants_vt) {
          down_to(x, value_width, down(dv, h), down(dvt, s));
        } else {
          down_to(x, value_width, down(dv, h));
        }
        if (has_qt) down_to(qt, width, down(dk, a));
        if (wants_kt) {
          down_to(q, width, down(dk, u), down(dkt, a));
        } else {
          down_to(q, width, down(dk, u));
        }
      } else {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float derivative = fmaf(scale, b[j][e], -statistic(kD, j, e));
            s[j][e] = may_hide && s[j][e] == 0.0f ? 0.0f : s[j][e] * derivative;
          }
        }
        down_to(q, width, down(dk, s));
      }
    };
    if (hides) {
      add(std::true_type{});
    } else {
      add(std::false_type{});
    }
  };
  stream<kRegular>(group * per_head, plan.slots, issue, consume);

  const auto write = [&](const auto& sums, const View4& view, KeySide which, int columns) {
    write_gradient(sums, tiles.own(which, own), 0, view, place.batch, place.head, sequence.key, key,
                   all_keys, column, columns, lane);
  };
  write(dk, p.grad_key, kK, width);
  write(dv, p.grad_value, kV, value_width);
  if constexpr (kTangent) {
    if (p.grad_key_t.data != nullptr) write(dkt, p.grad_key_t, kKT, width);
    if (p.grad_value_t.data != nullptr) write(dvt, p.grad_value_t, kVT, value_width);
  }
}

}  // namespace pmf::cuda
