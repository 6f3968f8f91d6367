// A consumer of the Hopper attention forward: its parameters, shared memory, registers, and a row
// block against the tiles that it sees. See hopper_forward.cuh.
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
  // For C::kLimited, where `queries` and `keys` count the rows of all sequences, and items and row
  // blocks have tiles of their own.
  AttentionSequences sequences;
  Window window;
};

// For C::kLimited: an item of a consumer, in shared memory. Its copying warp fills it in.
struct HopperNote {
  int batch, head;
  Sequence sequence;
  int first;                 // first query; negative: there are no further items
  int tile;                  // first tile that the queries see
  int before, tiles, after;  // tiles of the item before those that they see, those, and after them
};

// kLimited: for windows and packed sequences.
template <typename T, int kWidth, int kKeys_, int kSlots_, bool kTangent_, bool kLimited_>
struct HopperSizes : HopperShape<T, kWidth, kKeys_, kTangent_ ? 2 : 1> {
  using Base = HopperShape<T, kWidth, kKeys_, kTangent_ ? 2 : 1>;
  static constexpr int kKeys = kKeys_, kSlots = kSlots_;
  static constexpr bool kTangent = kTangent_, kLimited = kLimited_;
  // Warpgroups that compute, and registers per thread of theirs.
  static constexpr int kConsumers = kTangent ? 2 : 3, kRegisters = kTangent ? 240 : 160;
  static constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
  // Whether queries are multiplied from registers. From shared memory, a product with 48 keys waits
  // for it; only here are there registers to spare.
  static constexpr bool kOwnQueries = kTangent && !kLimited && kWidth == 80;
  // Keys or values of a slot, and queries of a consumer, each with their tangents.
  static constexpr uint32_t kSideBytes = Base::Tile::kBytes, kSlotBytes = 2 * kSideBytes;
  static constexpr uint32_t kQueryBytes = Base::Rows::kBytes;
  // Shared memory: the queries of each consumer, the ring, a tile of values for each consumer if
  // kLimited, the barriers; then, if kLimited, two notes and a flag per warp for each consumer.
  static constexpr uint32_t kRing = kConsumers * kQueryBytes;
  static constexpr uint32_t kSpare = kRing + kSlots * kSlotBytes;
  static constexpr uint32_t kBarriers = kSpare + (kLimited ? kConsumers * kSideBytes : 0);
  static constexpr int kBarrierCount = 4 * kSlots + 2 * kConsumers;
  static constexpr uint32_t kNotes = kBarriers + 8 * kBarrierCount;
  static constexpr uint32_t kFlags = kNotes + 2 * kConsumers * sizeof(HopperNote);
  static constexpr int kSharedBytes =
      int(kLimited ? kFlags + 4 * kConsumers * kGroupWarps : kNotes);
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
  __device__ uint32_t spare(int consumer) const {
    return base + C::kSpare + uint32_t(consumer) * C::kSideBytes;
  }
  __device__ static HopperNote& note(int consumer, uint32_t parity) {
    return reinterpret_cast<HopperNote*>(swizzled_shared() + C::kNotes)[2 * consumer + int(parity)];
  }
  __device__ static uint32_t* flags(int consumer) {
    return reinterpret_cast<uint32_t*>(swizzled_shared() + C::kFlags) + kGroupWarps * consumer;
  }

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

// ---- the copying warp ---------------------------------------------------------------------------

// Fills a slot with the keys and values from a row on, as soon as its consumers have released it.
template <class C>
__device__ inline void copy_tile(const HopperForward& p, const HopperPlaces<C>& at,
                                 const RingPlace<C::kSlots>& place, int row, int head, int batch) {
  mbarrier_wait(at.keys_empty(place.slot), place.parity ^ 1);
  copy_rows<C, typename C::Tile>(at.keys(place.slot), p.key, p.key_t, at.keys_full(place.slot), row,
                                 head, batch);
  mbarrier_wait(at.values_empty(place.slot), place.parity ^ 1);
  copy_values<C>(at.values(place.slot), p.value, p.value_t, at.values_full(place.slot), row, head,
                 batch);
}

// ---- registers ----------------------------------------------------------------------------------

// The registers of a warp: 16 queries of the row block.
template <class C>
struct HopperUnit {
  using E = typename C::E;

  RowState rows;
  float s[C::kTiles][4], ts[C::kTiles][4];
  float o[C::kOutTiles][4], ot[C::kTangent ? C::kOutTiles : 1][4];
  FragmentA probability[C::kDepths], h[C::kTangent ? C::kDepths : 1];
  // If C::kOwnQueries: the queries and their tangents.
  static constexpr int kSteps = C::kOwnQueries ? C::kWidth / 16 : 1;
  FragmentA query[kSteps], query_t[kSteps];

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
  __device__ void hold_queries() {
    if constexpr (C::kOwnQueries) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) hold(query[i].x), hold(query_t[i].x);
    }
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

  // `rows`: where the queries are in shared memory.
  __device__ void load_queries(const unsigned char* rows, int thread) {
    load_rows<C, 0>(query, rows, thread);
    load_rows<C, 1>(query_t, rows, thread);
  }

  // S = Q K^T,  tS = Q tK^T + tQ K^T.
  __device__ void multiply_scores(uint32_t queries, uint32_t keys) {
    if constexpr (C::kOwnQueries) {
      wgmma_across<C, 0>(s, query, keys, false);
      wgmma_across<C, 1>(ts, query, keys, false);
      wgmma_across<C, 0>(ts, query_t, keys, true);
      return;
    }
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
      wgmma_values<C, 0>(o, probability[i], values, i);
      if constexpr (C::kTangent) {
        wgmma_values<C, 1>(ot, probability[i], values, i);
        wgmma_values<C, 0>(ot, h[i], values, i);
      }
    }
  }

  // Masks the keys that the lane's rows do not see, as seen by rows_in_window(). `query`, `key`: of
  // the lane's first score.
  __device__ void hide_outside(const Window& window, int query, int key, int keys) {
    int low[2], high[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = query + 8 * h;
      const RowRange seen = rows_in_window(row, row, window.left, window.right, keys, 1);
      low[h] = seen.begin - key, high[h] = seen.end - key;
    }
#pragma unroll
    for (int j = 0; j < C::kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 8 * j + e % 2;
        if (column >= low[e / 2] && column < high[e / 2]) continue;
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

  // Like ForwardUnit::finish(). `query`: row g of the lane, of `queries` (by reference, to be read
  // where it is needed) in its sequence, which begins at row `start` of the tensors.
  __device__ void finish(const HopperForward& p, int batch, int head, int start, int query,
                         const int& queries, int lane) {
    constexpr float kLn2 = 0.6931471805599453f;
    using T = typename C::T;
    const auto at_start = [&](const View4& view) {
      return static_cast<T*>(view.data) + int64_t(batch) * view.stride[0] +
             int64_t(head) * view.stride[1] + int64_t(start) * view.stride[2];
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
      if ((lane & 3) == 0 && query + 8 * r < queries) {
        const int64_t row = (int64_t(batch) * p.heads + head) * p.queries + start + query + 8 * r;
        p.lse[row] = sum == 0.0f ? -INFINITY : kLn2 * (rows.top[r] + log2_approx(sum));
        if (C::kTangent && p.lse_t != nullptr) p.lse_t[row] = rows.pivot[r] + residual;
      }
    }
    store_sums(o, at_start(p.out), p.out.stride[2], query, queries, lane);
    if constexpr (C::kTangent) {
      store_sums(ot, at_start(p.out_t), p.out_t.stride[2], query, queries, lane);
    }
  }
};

// ---- a row block against its tiles --------------------------------------------------------------

// A warp releases a slot, or its queries: it has waited for its products.
__device__ inline void release(uint32_t barrier, int lane) {
  if (lane == 0) mbarrier_arrive(barrier);
}

// Queues a row block's products with its first tile, at `place`. `rows`: its queries.
template <class C>
__device__ inline void begin_tiles(const HopperPlaces<C>& at, HopperUnit<C>& unit, uint32_t rows,
                                   const RingPlace<C::kSlots>& place) {
  unit.hold_scores();
  unit.hold_queries();
  wgmma_fence();
  unit.multiply_scores(rows, at.keys(place.slot));
  wgmma_commit();
}

// The row block whose queries consumer c has, with `unit` reset and begin_tiles() done, against the
// tiles from `place` on; moves `place` past them. The products with the last one's values are
// queued: end_tiles() waits for them. `last`: releases the tiles.
//
//   limits.lane()                  the thread's lane
//   limits.tiles()                 the number of tiles, at least one
//   limits.hide(unit, j)           masks scores of tile j
//   limits.values(unit, j, place)  the address of the values of tile j
//
// Limits.values() is called only if C::kLimited, and in one place, because it is long.
template <class C, class Limits>
__device__ inline void add_tiles(const HopperForward& p, const HopperPlaces<C>& at, int c,
                                 HopperUnit<C>& unit, const Limits& limits,
                                 RingPlace<C::kSlots>& place, bool last) {
  uint32_t queries = at.queries(c);
  const auto hide = [&](int j) {
    if (j + 1 == limits.tiles()) {
      if (!C::kOwnQueries) release(at.queries_empty(c), limits.lane());
      if (!C::kLimited) limits.hide(unit, j);
    }
    if (C::kLimited) limits.hide(unit, j);
  };
  wgmma_wait<0>();
  unit.hold_scores();
  if (last) release(at.keys_empty(place.slot), limits.lane());
  hide(0);
  softmax_tile<C::kTangent>(unit.rows, unit.s, unit.ts, p.factor, p.scale);
  unit.pack();
  uint32_t values = 0;
#pragma unroll 1
  for (int j = 1; C::kLimited || j < limits.tiles(); ++j) {
    if constexpr (C::kLimited) {
      values = limits.values(unit, j - 1, place);
      if (j == limits.tiles()) break;
    }
    const RingPlace<C::kSlots> next = place.next();
    mbarrier_wait(at.keys_full(next.slot), next.parity);
    // Registers are scarce: one for this address instead of several for what depends on it.
    if constexpr (C::kLimited || C::kWidth == 128) hold(queries);
    unit.hold_scores();
    unit.hold_results();
    wgmma_fence();
    unit.multiply_scores(queries, at.keys(next.slot));
    wgmma_commit();
    mbarrier_wait(at.values_full(place.slot), place.parity);
    wgmma_fence();
    unit.multiply_values(C::kLimited ? values : at.values(place.slot));
    wgmma_commit();
    wgmma_wait<1>();
    unit.hold_scores();
    if (last) release(at.keys_empty(next.slot), limits.lane());
    hide(j);
    softmax_tile<C::kTangent>(unit.rows, unit.s, unit.ts, p.factor, p.scale);
    unit.hold_scores();
    wgmma_wait<0>();
    unit.hold_results();
    if (last) release(at.values_empty(place.slot), limits.lane());
    unit.rescale();
    unit.pack();
    place = next;
  }
  mbarrier_wait(at.values_full(place.slot), place.parity);
  unit.hold_results();
  wgmma_fence();
  unit.multiply_values(C::kLimited ? values : at.values(place.slot));
  wgmma_commit();
  place = place.next();
}

// Waits for all but the kQueued newest groups of products. `last`: releases the tile before
// `place`.
template <class C, int kQueued>
__device__ inline void end_tiles(const HopperPlaces<C>& at, HopperUnit<C>& unit,
                                 const RingPlace<C::kSlots>& place, bool last, int lane) {
  wgmma_wait<kQueued>();
  unit.hold_results();
  if (last) release(at.values_empty(place.before(1).slot), lane);
}

// Releases `tiles` tiles that the consumer does not need, once they have arrived.
template <class C>
__device__ inline void skip_tiles(const HopperPlaces<C>& at, RingPlace<C::kSlots>& place, int tiles,
                                  int lane) {
  for (int j = 0; j < tiles; ++j, place = place.next()) {
    mbarrier_wait(at.keys_full(place.slot), place.parity);
    release(at.keys_empty(place.slot), lane);
    mbarrier_wait(at.values_full(place.slot), place.parity);
    release(at.values_empty(place.slot), lane);
  }
}

}  // namespace pmf::cuda
