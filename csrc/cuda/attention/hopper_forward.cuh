// Attention's forward, with and without tangents, by Hopper's own instructions (hopper.cuh): the
// mathematics of attention_forward.cuh, the same online softmax and pivot.
//
// A block has three warpgroups and stays on its multiprocessor until all work is done. One gives
// its registers away and copies: a warp keys and values with their tangents, tile by tile into a
// ring, and a warp for each consumer its queries. The two consumers take 64 queries each, a row
// block, against tiles of kKeys keys; their S and tS, P and H, O and tO stay in registers:
//
//   S(j + 1), tS(j + 1) = products         queued before P(j) V(j), so that the tensor cores
//   O, tO += P(j) V(j) ...                 compute while softmax(j + 1) runs
//
// The three score products of a tile, and the three value products, have the sums of one of them
// each, S or tS, O or tO: sums that overlap without being equal would make ptxas wait for every
// product by itself.
//
// An item of work is a head and `rounds` row blocks for each consumer. Where a head's tiles fit the
// ring, they stay there until the last of its row blocks (276 keys are three tiles); the consumer
// that gets one row block less is the other one for every second item. Else a consumer takes one.
//
// Warps arrive for themselves when their products have been waited for: a slot is empty after four
// for each consumer.
#pragma once

#include "cuda/attention/attention_forward.cuh"
#include "cuda/common/divisor.h"
#include "cuda/common/hopper.cuh"

namespace pmf::cuda {

constexpr int kRowBlock = 64, kConsumers = 2, kGroupThreads = 128, kPieceColumns = 64;

// Of one tensor: boxes of 64 columns, and of the 16 or 32 that are left of widths 80 and 96.
struct HopperMaps {
  TensorMap piece, tail;
};

// Everything of a launch.
struct HopperForward {
  HopperMaps query, query_t, key, key_t, value, value_t;
  View4 out, out_t;
  float *lse, *lse_t;  // [batch, heads, queries]; lse_t may be null
  int heads, queries, keys;
  int tiles, row_blocks, rounds;  // of a head; row blocks of a consumer and item
  int items;
  Divisor by_parts, by_heads, by_group;  // items of a head, heads, heads of a key head
  float factor, scale;                   // of scores in log-2 units; of their tangents
};

// Rows of a tensor and, of two sides, of its tangent: the pieces of the one, of the other, their
// tails. Multiples of 1024 bytes, where the swizzle begins anew.
template <int kRows_, int kPieces, int kTail, int kSides>
struct HopperTile {
  static constexpr int kRows = kRows_;
  static constexpr uint32_t kPieceBytes = kRows * 2 * kPieceColumns;
  static constexpr uint32_t kTailBytes = kRows * 2 * kTail;
  static constexpr uint32_t kTails = kSides * kPieces * kPieceBytes;
  static constexpr uint32_t kCopied = kTails + kSides * kTailBytes;
  static constexpr uint32_t kBytes = (kCopied + 1023) / 1024 * 1024;

  __device__ static constexpr uint32_t piece(int side, int i) {
    return uint32_t(side * kPieces + i) * kPieceBytes;
  }
  __device__ static constexpr uint32_t tail(int side) {
    return kTails + uint32_t(side) * kTailBytes;
  }
};

template <typename T_, int kWidth_, int kKeys_, int kSlots_, bool kTangent_>
struct HopperSizes {
  using T = T_;
  using E = Arithmetic16<T>;
  static constexpr int kWidth = kWidth_, kKeys = kKeys_, kSlots = kSlots_;
  static constexpr bool kTangent = kTangent_;
  static constexpr int kSides = kTangent ? 2 : 1;
  static constexpr int kTiles = kKeys / 8, kOutTiles = kWidth / 8, kDepths = kKeys / 16;
  static constexpr int kPieces = kWidth / kPieceColumns, kTail = kWidth % kPieceColumns;
  static constexpr int kTailTiles = kTail / 8;
  static_assert(kTail == 0 || kTail == 16 || kTail == 32, "as wide as a swizzle");
  static constexpr Swizzle kTailSwizzle = kTail == 16 ? Swizzle::bytes32 : Swizzle::bytes64;
  static constexpr uint32_t kRowBytes = 2 * kPieceColumns;  // of a piece: the swizzle's
  static constexpr uint32_t kTailRowBytes = 2 * kTail;
  // Keys or values of a slot, and queries of a consumer.
  using Tile = HopperTile<kKeys, kPieces, kTail, kSides>;
  using Queries = HopperTile<kRowBlock, kPieces, kTail, kSides>;
  static constexpr uint32_t kSideBytes = Tile::kBytes, kSlotBytes = 2 * kSideBytes;
  static constexpr uint32_t kQueryBytes = Queries::kBytes;
  // Queries of each consumer, the ring, the barriers.
  static constexpr uint32_t kRing = kConsumers * kQueryBytes;
  static constexpr uint32_t kBarriers = kRing + kSlots * kSlotBytes;
  static constexpr int kBarrierCount = 4 * kSlots + 2 * kConsumers;
  static constexpr int kSharedBytes = int(kBarriers) + 8 * kBarrierCount;
};

// Where things are in shared memory.
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
  __device__ uint32_t queries_empty(int c) const { return barrier(4 * C::kSlots + kConsumers + c); }

 private:
  __device__ uint32_t barrier(int i) const { return base + C::kBarriers + 8 * uint32_t(i); }
};

// A place in the ring, and the parity of the phase in which it is full.
template <int kSlots>
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;

  __device__ RingPlace next() const {
    return slot + 1 == kSlots ? RingPlace{0, parity ^ 1} : RingPlace{slot + 1, parity};
  }
  // So many places before, no more than there are slots.
  __device__ RingPlace before(int count) const {
    return slot < count ? RingPlace{slot + kSlots - count, parity ^ 1}
                        : RingPlace{slot - count, parity};
  }
};

struct HopperItem {
  int batch, head, first;  // row block
};

__device__ inline HopperItem hopper_item(const HopperForward& p, int item) {
  uint32_t index = uint32_t(item);
  const int first = int(p.by_parts.divide(index)) * kConsumers * p.rounds;
  const int head = int(p.by_heads.divide(index));
  return {int(index), head, first};
}

// The row blocks of consumer `c` in the block's i-th item: first + turn, and every second one.
struct HopperShare {
  int turn, count;
};
__device__ inline HopperShare hopper_share(const HopperForward& p, const HopperItem& item, int c,
                                           int i) {
  const int turn = (c + i) % kConsumers, left = p.row_blocks - item.first - turn;
  const int count = (left + kConsumers - 1) / kConsumers;
  return {turn, count < 0 ? 0 : count < p.rounds ? count : p.rounds};
}

// ---- the copying warps --------------------------------------------------------------------------

// Rows from `row` on, as a Tile; its bytes are announced.
template <class C, class Tile>
__device__ inline void copy_rows(uint32_t to, const HopperMaps& maps, const HopperMaps& tangents,
                                 uint32_t barrier, int row, int head, int batch) {
  mbarrier_expect(barrier, Tile::kCopied);
#pragma unroll
  for (int side = 0; side < C::kSides; ++side) {
    const HopperMaps& from = side == 0 ? maps : tangents;
#pragma unroll
    for (int i = 0; i < C::kPieces; ++i) {
      copy_box(to + Tile::piece(side, i), &from.piece, barrier, i * kPieceColumns, row, head,
               batch);
    }
    if (C::kTail > 0) {
      copy_box(to + Tile::tail(side), &from.tail, barrier, C::kPieces * kPieceColumns, row, head,
               batch);
    }
  }
}

template <class C>
__device__ inline void copy_keys_and_values(const HopperForward& p, const HopperPlaces<C>& at) {
  RingPlace<C::kSlots> place;
  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x)) {
    const HopperItem here = hopper_item(p, item);
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
    const HopperItem here = hopper_item(p, item);
    const HopperShare share = hopper_share(p, here, c, i);
    for (int r = 0; r < share.count; ++r, parity ^= 1) {
      const int row = (here.first + share.turn + r * kConsumers) * kRowBlock;
      mbarrier_wait(at.queries_empty(c), parity ^ 1);
      copy_rows<C, typename C::Queries>(at.queries(c), p.query, p.query_t, at.queries_full(c), row,
                                        here.head, here.batch);
    }
  }
}

// ---- the consumers ------------------------------------------------------------------------------

// The registers of 16 of a row block's queries: a warp's.
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

  // The compiler leaves them where they are.
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
    score_product<0, 0>(s, queries, keys, false);
    if constexpr (C::kTangent) {
      score_product<0, 1>(ts, queries, keys, false);
      score_product<1, 0>(ts, queries, keys, true);
    }
  }

  // O += P V,  tO += P tV + H V.
  __device__ void multiply_values(uint32_t values) {
#pragma unroll
    for (int i = 0; i < C::kDepths; ++i) {
      value_product<0>(o, probability[i], values, i);
      if constexpr (C::kTangent) {
        value_product<1>(ot, probability[i], values, i);
        value_product<0>(ot, h[i], values, i);
      }
    }
  }

  // Hides keys from `end` on; `key` is the lane's first one.
  __device__ void hide(int key, int end) {
#pragma unroll
    for (int j = 0; j < C::kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (key + 8 * j + e % 2 < end) continue;
        s[j][e] = -INFINITY;
        if constexpr (C::kTangent) ts[j][e] = 0.0f;
      }
    }
  }

  // O and tO, as the tile that comes next needs them; then its P and H, and their rounded sums.
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

  // As ForwardUnit::finish(). `query`: the lane's row g.
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
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
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

 private:
  // Descriptors are one base plus constants: so they take few registers.
  __device__ static uint64_t descriptor(uint32_t base, uint32_t row_bytes, Swizzle swizzle) {
    return matrix_descriptor(base, C::Tile::kPieceBytes, 8 * row_bytes, swizzle);
  }
  __device__ static constexpr uint64_t further(uint32_t bytes) { return bytes >> 4; }

  // Of the queries (side 0) or their tangents (1) and the keys or theirs: a step of 16 columns is
  // 32 bytes along a row.
  template <int kSideOfQueries, int kSideOfKeys>
  __device__ static void score_product(float (&sums)[C::kTiles][4], uint32_t queries, uint32_t keys,
                                       bool adds) {
    const uint64_t a =
        descriptor(queries + C::Queries::piece(kSideOfQueries, 0), C::kRowBytes, Swizzle::bytes128);
    const uint64_t b =
        descriptor(keys + C::Tile::piece(kSideOfKeys, 0), C::kRowBytes, Swizzle::bytes128);
#pragma unroll
    for (int i = 0; i < 4 * C::kPieces; ++i) {
      const uint32_t step = uint32_t(i) % 4 * 32;
      wgmma<typename C::T, false>(sums, a + further(C::Queries::piece(0, i / 4) + step),
                                  b + further(C::Tile::piece(0, i / 4) + step), adds || i > 0);
    }
#pragma unroll
    for (int i = 0; i < C::kTail / 16; ++i) {
      const uint32_t step = uint32_t(i) * 32;
      wgmma<typename C::T, false>(sums,
                                  descriptor(queries, C::kTailRowBytes, C::kTailSwizzle) +
                                      further(C::Queries::tail(kSideOfQueries) + step),
                                  descriptor(keys, C::kTailRowBytes, C::kTailSwizzle) +
                                      further(C::Tile::tail(kSideOfKeys) + step),
                                  true);
    }
  }

  // Of the i-th 16 keys' values, or their tangents: 16 rows further on.
  template <int kSide>
  __device__ static void value_product(float (&sums)[C::kOutTiles][4], const FragmentA& a,
                                       uint32_t values, int i) {
    constexpr int kWhole = C::kOutTiles - C::kTailTiles;
    const uint32_t rows = 16 * uint32_t(i);
    wgmma<typename C::T, true>(reinterpret_cast<float (&)[kWhole][4]>(sums), a.x,
                               descriptor(values, C::kRowBytes, Swizzle::bytes128) +
                                   further(C::Tile::piece(kSide, 0) + C::kRowBytes * rows),
                               true);
    if constexpr (C::kTail > 0) {
      wgmma<typename C::T, true>(reinterpret_cast<float (&)[C::kTailTiles][4]>(sums[kWhole]), a.x,
                                 descriptor(values, C::kTailRowBytes, C::kTailSwizzle) +
                                     further(C::Tile::tail(kSide) + C::kTailRowBytes * rows),
                                 true);
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
    const HopperItem here = hopper_item(p, item);
    const HopperShare share = hopper_share(p, here, c, i);
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
      const int key = 2 * (lane & 3);
      if (p.tiles == 1) unit.hide(key, p.keys);
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
        if (j + 1 == p.tiles) unit.hide(key + j * C::kKeys, p.keys);
        softmax_tile<C::kTangent>(unit.rows, unit.s, unit.ts, p.factor, p.scale);
        unit.hold_scores();
        wgmma_wait<0>();
        unit.hold_results();
        if (last) release(at.values_empty(place.slot));
        unit.rescale();
        unit.pack();
        place = next;
      }
      release(at.queries_empty(c));
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
      const int query = (here.first + share.turn + r * kConsumers) * kRowBlock +
                        thread / kWarpThreads * 16 + (lane >> 2);
      unit.finish(p, here, query, lane);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(3 * kGroupThreads, 1)
    hopper_forward_kernel(const __grid_constant__ HopperForward p) {
  const HopperPlaces<C> at = {shared_address(swizzled_shared())};
  if (threadIdx.x == 0) {
    constexpr uint32_t kWarpsOfGroup = 4;
    for (int slot = 0; slot < C::kSlots; ++slot) {
      mbarrier_init(at.keys_full(slot), 1);
      mbarrier_init(at.values_full(slot), 1);
      mbarrier_init(at.keys_empty(slot), kConsumers * kWarpsOfGroup);
      mbarrier_init(at.values_empty(slot), kConsumers * kWarpsOfGroup);
    }
    for (int c = 0; c < kConsumers; ++c) {
      mbarrier_init(at.queries_full(c), 1);
      mbarrier_init(at.queries_empty(c), kWarpsOfGroup);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  // The same in all lanes, for the compiler to know.
  const int warp = shuffle_idx(int(threadIdx.x) / kWarpThreads, 0);
  if (warp < 4) {
    registers_down_to<24>();
    if (warp <= kConsumers && elect_one()) {
      warp == 0 ? copy_keys_and_values<C>(p, at) : copy_queries<C>(p, at, warp - 1);
    }
  } else {
    registers_up_to<240>();
    consume<C>(p, at, warp / 4 - 1);
  }
}

}  // namespace pmf::cuda
