// Gradients of keys and values, from the row statistics that the kernels of the queries left.
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
// Tiling: a block of 16 `warps` keys with its K and V in shared memory; the queries of every head
// of the group stream past in tiles of kColumns, so the sum over the group is a plain loop, and
// every sum has one fixed order. Scores lie transposed, keys along rows: a warp's own P^T and dS^T
// are the A operands of its gradients. Bytes: as attention_backward_queries, with keys and queries
// exchanged, and two gradients written. FLOPs: 4 products (12 with tangents), 2 Nq Nk D each.
// Shared memory: 40 ldmatrix.x4 for 64 mma per warp and tile at width 64. Bound: shared memory and
// tensor cores alike.
#pragma once

#include "cuda/attention/attention_backward.cuh"

namespace pmf::cuda {

template <typename E, int kWidth, int kOut, int kColumns, bool kTangent, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    attention_backward_keys(const AttentionBackwardParams p, const BackwardPlan plan) {
  using T = typename E::Storage;
  using Tile = SharedTile<T, kWidth>;
  constexpr int kTiles = kColumns / 8, kOutTiles = kOut / 8,
                kTangentTiles = kTangent ? kOutTiles : 2;
  constexpr int kTensors = kTangent ? 4 : 2;
  constexpr int kStats = kStatistics<kTangent>;

  const AttentionShape& shape = p.shape;
  const int rows = plan.rows;
  const int64_t widest = shape.width > shape.value_width ? shape.width : shape.value_width;
  const BlockPlace& place =
      place_block(widest, kOut, shape.keys, rows, shape.key_heads, shape.key_heads);
  const int column = place.column, first = place.first;
  const int group = int(shape.heads / shape.key_heads);
  const int queries = int(shape.queries), all_keys = int(shape.keys);

  const int thread = threadIdx.x, warp = thread / kWarpThreads, lane = thread % kWarpThreads;
  const int g = lane >> 2, t = lane & 3;
  const int own = warp * kWarpRows;
  const int key = first + own;
  const int width = int(shape.width), value_width = int(shape.value_width);
  const bool has_g = !kTangent || p.grad.data != nullptr;
  const bool has_qt = kTangent && p.query_t.data != nullptr;
  const bool has_kt = kTangent && p.key_t.data != nullptr;
  const bool has_vt = kTangent && p.value_t.data != nullptr;

  // Shared: K, V (tK, tV) of the block, then slots of Q, G (tQ, X), then the slots' statistics.
  T* const shared = reinterpret_cast<T*>(dynamic_shared() + kBackwardPlaceBytes);
  const auto own_tile = [&](int which) { return Tile{shared + which * rows * kWidth}; };
  T* const ring = shared + kTensors * rows * kWidth;
  const auto slot_tile = [&](int slot, int which) {
    return Tile{ring + (slot * kTensors + which) * kColumns * kWidth};
  };
  float* const statistics =
      reinterpret_cast<float*>(ring + plan.slots * kTensors * kColumns * kWidth);
  const auto load = [&](const Tile& tile, int count, const HeadView<T>& view, int row,
                        int row_count, int columns) {
    if (view.data == nullptr) return;
    load_rows(tile, count, view.data, view.row_stride, view.column_stride, row, row_count, columns,
              thread, int(blockDim.x));
  };
  load(own_tile(0), rows, head_of<T>(p.key, place.batch, place.head), first, all_keys, width);
  load(own_tile(1), rows, head_of<T>(p.value, place.batch, place.head), first, all_keys,
       value_width);
  if constexpr (kTangent) {
    load(own_tile(2), rows, head_of<T>(p.key_t, place.batch, place.head), first, all_keys, width);
    load(own_tile(3), rows, head_of<T>(p.value_t, place.batch, place.head), first, all_keys,
         value_width);
  }

  const float scale = float(p.scale), factor = float(p.scale * double(kLog2eFloat));
  float dk[kOutTiles][4], dv[kOutTiles][4], dkt[kTangentTiles][4], dvt[kTangentTiles][4];
  clear(dk);
  clear(dv);
  clear(dkt);
  clear(dvt);

  // Tiles of queries, head after head; causal queries before the block's first key attend none of
  // it.
  const int tiles = (queries + kColumns - 1) / kColumns;
  const int skipped = p.is_causal ? (first / kColumns < tiles ? first / kColumns : tiles) : 0;
  const int per_head = tiles - skipped;
  struct Place {
    int head, query;
  };
  const auto place_of = [&](int i) {
    const int local = per_head == 0 ? 0 : i / per_head;
    return Place{place.head * group + local, (skipped + i - local * per_head) * kColumns};
  };
  const auto issue = [&](int i, int slot) {
    const Place at = place_of(i);
    load(slot_tile(slot, 0), kColumns, head_of<T>(p.query, place.batch, at.head), at.query, queries,
         width);
    load(slot_tile(slot, 1), kColumns, head_of<T>(p.grad, place.batch, at.head), at.query, queries,
         value_width);
    if constexpr (kTangent) {
      load(slot_tile(slot, 2), kColumns, head_of<T>(p.query_t, place.batch, at.head), at.query,
           queries, width);
      load(slot_tile(slot, 3), kColumns, head_of<T>(p.grad_t, place.batch, at.head), at.query,
           queries, value_width);
    }
    constexpr int kCopies = kColumns * int(sizeof(float)) / kChunkBytes;  // of one statistic
    for (int c = thread; c < kStats * kCopies; c += int(blockDim.x)) {
      const int which = c / kCopies, part = c % kCopies * 4;
      const float* from =
          statistic_of<kTangent>(plan, shape, place.batch, at.head, which) + at.query;
      cp_async_16(statistics + (slot * kStats + which) * kColumns + part, from + part);
    }
  };
  const auto consume = [&](int i, int slot) {
    if (key >= all_keys) return;
    const Place at = place_of(i);
    if (p.is_causal && at.query + kColumns - 1 < key) return;
    const Tile q = slot_tile(slot, 0), grad = slot_tile(slot, 1);
    const Tile qt = slot_tile(slot, 2), x = slot_tile(slot, 3);  // with tangents
    float s[kTiles][4], b[kTiles][4];
    clear(s);
    clear(b);
    multiply_across<E, true>(s, own_tile(0), own, q, width, lane);
    if (has_g) multiply_across<E, true>(b, own_tile(1), own, grad, value_width, lane);
    if (has_vt) multiply_across<E, true>(b, own_tile(3), own, x, value_width, lane);
    const bool edge = p.is_causal && at.query < key + kWarpRows - 1;
    finish_scores<true>(s, p, {place.batch, at.head, at.query + 2 * t, key + g}, factor, edge);

    const float* const row = statistics + slot * kStats * kColumns;
    const auto statistic = [&](int which, int j, int e) {
      return row[which * kColumns + 8 * j + 2 * t + e % 2];
    };
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[j][e] = exp2_approx(s[j][e] - statistic(kTop, j, e)) * statistic(kWeight, j, e);
      }
    }
    if (has_g) multiply_down<E>(dv, s, grad, column, value_width, lane);
    if constexpr (kTangent) {
      float u[kTiles][4], a[kTiles][4];
      clear(u);
      clear(a);
      if (has_qt) multiply_across<E, true>(u, own_tile(0), own, qt, width, lane);
      if (has_kt) multiply_across<E, true>(u, own_tile(2), own, q, width, lane);
      multiply_across<E, true>(a, own_tile(1), own, x, value_width, lane);
      if (p.grad_value_t.data != nullptr) multiply_down<E>(dvt, s, x, column, value_width, lane);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float centred = a[j][e] - statistic(kA, j, e);
          const float tangent = fmaf(scale, u[j][e], -statistic(kR, j, e));
          b[j][e] = fmaf(tangent, centred, b[j][e]);
          a[j][e] = s[j][e] * (scale * centred);
          u[j][e] = s[j][e] * tangent;
        }
      }
      if (has_qt || has_kt) multiply_down<E>(dv, u, x, column, value_width, lane);
      if (has_qt) multiply_down<E>(dk, a, qt, column, width, lane);
      if (p.grad_key_t.data != nullptr) multiply_down<E>(dkt, a, q, column, width, lane);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] *= fmaf(scale, b[j][e], -statistic(kD, j, e));
    }
    multiply_down<E>(dk, s, q, column, width, lane);
  };
  stream(group * per_head, plan.slots, issue, consume);

  const auto write = [&](const auto& sums, const View4& view, int which, int columns) {
    write_gradient(sums, own_tile(which), own, view, place.batch, place.head, key, all_keys, column,
                   columns, lane);
  };
  write(dk, p.grad_key, 0, width);
  write(dv, p.grad_value, 1, value_width);
  if constexpr (kTangent) {
    if (p.grad_key_t.data != nullptr) write(dkt, p.grad_key_t, 2, width);
    if (p.grad_value_t.data != nullptr) write(dvt, p.grad_value_t, 3, value_width);
  }
}

}  // namespace pmf::cuda
