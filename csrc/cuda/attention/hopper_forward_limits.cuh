// The Hopper attention forward for windows and packed sequences: what differs from
// hopper_forward.cuh.
//
// An item is as many row blocks of a sequence and head as there are consumers, one each, and the
// tiles that any of them sees. Consumers release the tiles that they do not see without reading
// them. To find an item's sequence takes several reads from global memory one after the other; the
// copying warps do it in advance and leave a note with the queries.
//
// Only tiles that cross the end of the sequence or the window are masked. A masked score is -inf
// and its P zero, but zero times a masked value that is inf or NaN is NaN (attention_hidden.cuh),
// and wgmma reads the values from shared memory, where other consumers may see them. So a warpgroup
// searches the rows of such a tile that are hidden from any of its queries. If it finds inf or NaN,
// it multiplies a copy of the tile with zeros in their place, and separately adds those that its
// queries see.
#pragma once

#include "cuda/attention/attention_hidden.cuh"
#include "cuda/attention/hopper_forward_unit.cuh"

namespace pmf::cuda {

// ---- items --------------------------------------------------------------------------------------

struct HopperPart {
  int batch, head;
  Sequence sequence;
  int first;        // first query
  int tile, tiles;  // first tile, and number of tiles, that its queries see
};

// The tiles that queries [first, first + count) see: first and number.
template <class C>
__device__ inline void tiles_seen(const HopperForward& p, const Sequence& sequence, int first,
                                  int count, int& tile, int& tiles) {
  const int left = sequence.queries - first;
  const int last = first + (count < left ? count : left) - 1;
  const RowRange seen =
      rows_in_window(first, last, p.window.left, p.window.right, sequence.keys, 1);
  tile = seen.begin / C::kKeys;
  tiles = seen.begin < seen.end ? (seen.end - 1) / C::kKeys + 1 - tile : 0;
}

// The block's i-th item; false if there is none. Every second round of blocks runs backwards: under
// causality the last row blocks of a head have the most work, and not always the same blocks should
// get them.
__device__ inline bool item_of_round(const HopperForward& p, int i, int& item) {
  const int blocks = int(gridDim.x), block = int(blockIdx.x);
  item = i * blocks + (i % 2 == 0 ? block : blocks - 1 - block);
  return item < p.items;
}

// Sets `here` to an item; false if it is empty, past the end of a packed sequence.
template <class C>
__device__ inline bool find_part(const HopperForward& p, int item, HopperPart& here) {
  constexpr int kRows = C::kConsumers * kRowBlock;
  uint32_t index = uint32_t(item);
  int block = int(p.by_parts.divide(index));
  here.head = int(p.by_heads.divide(index)), here.batch = int(index);
  AttentionShape shape;
  shape.queries = p.queries, shape.keys = p.keys;
  here.sequence = sequence_of<false>(p.sequences, shape, kRows, block);
  here.first = block * kRows;
  if (here.first >= here.sequence.queries) return false;
  tiles_seen<C>(p, here.sequence, here.first, kRows, here.tile, here.tiles);
  return true;
}

// What consumer c has to do for an item.
template <class C>
__device__ inline HopperNote note_of(const HopperForward& p, const HopperPart& here, int c) {
  HopperNote note = {here.batch, here.head, here.sequence, here.first + c * kRowBlock, 0, 0, 0, 0};
  if (note.first < here.sequence.queries) {
    tiles_seen<C>(p, here.sequence, note.first, kRowBlock, note.tile, note.tiles);
  }
  note.before = note.tiles > 0 ? note.tile - here.tile : 0;
  note.after = here.tiles - note.before - note.tiles;
  return note;
}

// ---- the copying warps --------------------------------------------------------------------------

template <class C>
__device__ inline void copy_seen_tiles(const HopperForward& p, const HopperPlaces<C>& at) {
  RingPlace<C::kSlots> place;
  HopperPart here;
  for (int i = 0, item; item_of_round(p, i, item); ++i) {
    if (!find_part<C>(p, item, here)) continue;
    uint32_t head = uint32_t(here.head);
    p.by_group.divide(head);
    for (int j = 0; j < here.tiles; ++j, place = place.next()) {
      const int row = here.sequence.key + (here.tile + j) * C::kKeys;
      copy_tile(p, at, place, row, int(head), here.batch);
    }
  }
}

// Called by a whole warp. Leaves a note for each item, and at last one that says that there are no
// more. The consumer has read the note before last once it has released the last one's queries.
template <class C>
__device__ inline void copy_noted_queries(const HopperForward& p, const HopperPlaces<C>& at,
                                          int c) {
  uint32_t parity = 0;
  const auto leave = [&](const HopperNote& note) {
    mbarrier_wait(at.queries_empty(c), parity ^ 1);
    if (threadIdx.x % kWarpThreads == 0) at.note(c, parity) = note;
    __syncwarp();
    if (elect_one()) {
      if (note.tiles > 0) {
        copy_rows<C, typename C::Rows>(at.queries(c), p.query, p.query_t, at.queries_full(c),
                                       note.sequence.query + note.first, note.head, note.batch);
      } else {
        mbarrier_arrive(at.queries_full(c));
      }
    }
    parity ^= 1;
  };
  HopperPart here;
  for (int i = 0, item; item_of_round(p, i, item); ++i) {
    if (find_part<C>(p, item, here)) leave(note_of<C>(p, here, c));
  }
  HopperNote none = {};
  none.first = -1;
  leave(none);
}

// ---- the consumers ------------------------------------------------------------------------------

// The thread's number in its warpgroup, computed where it is needed: there is no register left to
// keep it in.
__device__ inline uint32_t thread_of_group() {
  uint32_t thread = threadIdx.x;
  hold(thread);
  return thread % kGroupThreads;
}

// The limits of a row block, in the terms of add_tiles().
template <class C>
struct HopperLimits {
  using Tile = typename C::Tile;
  using T = typename C::T;
  using E = typename C::E;
  using Place = RingPlace<C::kSlots>;

  const HopperForward& p;
  const HopperPlaces<C>& at;
  const HopperNote& note;
  int c;

  __device__ int lane() const { return int(threadIdx.x % kWarpThreads); }
  __device__ int tiles() const { return note.tiles; }

  __device__ void hide(HopperUnit<C>& unit, int j) const {
    const uint32_t thread = thread_of_group();
    const int lane = int(thread % kWarpThreads);
    const int query = note.first + int(thread / kWarpThreads) * 16;
    const int key = first_key(j), keys = note.sequence.keys;
    if (key + C::kKeys <= keys && !crosses(p.window, query, 16, key, C::kKeys)) return;
    unit.hide_outside(p.window, query + (lane >> 2), key + 2 * (lane & 3), keys);
  }

  // The whole warpgroup decides alike.
  __device__ uint32_t values(HopperUnit<C>& unit, int j, const Place& place) const {
    const uint32_t tile = at.values(place.slot);
    const int key = first_key(j);
    // Past the end of the tensors, copies are zero.
    const bool past = p.sequences.queries != nullptr && key + C::kKeys > note.sequence.keys;
    if (!past && !crosses(p.window, note.first, kRowBlock, key, C::kKeys)) return tile;
    mbarrier_wait(at.values_full(place.slot), place.parity);
    const unsigned char* const from = swizzled_shared() + (tile - at.base);
    if (!agree(hides_not_finite(from, key))) return tile;
    copy_finite(from);
    add_seen(unit, from);
    return at.spare(c);
  }

 private:
  __device__ int first_key(int j) const { return (note.tile + j) * C::kKeys; }

  // The warpgroup's barrier.
  __device__ static void meet() {
    uint32_t thread = threadIdx.x;
    hold(thread);
    barrier_sync(int(thread / kGroupThreads), kGroupThreads);
  }

  // Whether any thread of the warpgroup says so. Its spare tile may be overwritten afterwards.
  __device__ bool agree(bool said) const {
    uint32_t* const flags = at.flags(c);
    const bool of_warp = any_lane(said);
    const uint32_t thread = thread_of_group();
    if (thread % kWarpThreads == 0) flags[thread / kWarpThreads] = of_warp;
    meet();
    uint32_t any = 0;
    for (int warp = 0; warp < kGroupWarps; ++warp) any |= flags[warp];
    meet();
    return any != 0;
  }

  // Whether the thread finds inf or NaN in its part of the rows that are hidden from any query.
  __device__ bool hides_not_finite(const unsigned char* tile, int key) const {
    const int keys = note.sequence.keys;
    bool found = false;
    for (uint32_t i = thread_of_group() * kChunkBytes; i < Tile::kCopied;
         i += kGroupThreads * kChunkBytes) {
      const int row = key + C::row_at(i);
      if (row < keys && !crosses(p.window, note.first, kRowBlock, row, 1)) continue;
      const uint4 w = *reinterpret_cast<const uint4*>(tile + i);
      found |=
          (not_finite<T>(w.x) | not_finite<T>(w.y) | not_finite<T>(w.z) | not_finite<T>(w.w)) != 0;
    }
    return found;
  }

  // Copies the tile to the warpgroup's spare one, with zeros in place of inf and NaN.
  __device__ void copy_finite(const unsigned char* tile) const {
    unsigned char* const to = swizzled_shared() + (at.spare(c) - at.base);
#pragma unroll 1
    for (uint32_t i = thread_of_group() * kChunkBytes; i < Tile::kCopied;
         i += kGroupThreads * kChunkBytes) {
      uint4 w = *reinterpret_cast<const uint4*>(tile + i);
      w.x &= ~not_finite<T>(w.x), w.y &= ~not_finite<T>(w.y);
      w.z &= ~not_finite<T>(w.z), w.w &= ~not_finite<T>(w.w);
      *reinterpret_cast<uint4*>(to + i) = w;
    }
    fence_proxy_async();
    meet();
  }

  __device__ void add_seen(HopperUnit<C>& unit, const unsigned char* tile) const {
    add_seen<0>(unit.o, unit.probability, unit.probability, tile);
    if constexpr (C::kTangent) {
      add_seen<0>(unit.ot, unit.probability, unit.h, tile);
      add_seen<1>(unit.ot, unit.probability, unit.probability, tile);
    }
  }
  // out += q V wherever an inf or NaN in V meets a p > 0, as in add_not_finite() of the other
  // kernels.
  template <int kSide>
  __device__ void add_seen(float (&out)[C::kOutTiles][4], const FragmentA (&p)[C::kDepths],
                           const FragmentA (&q)[C::kDepths], const unsigned char* tile) const {
    const int lane = int(thread_of_group() % kWarpThreads);
#pragma unroll 1
    for (int n = 0; n < C::kOutTiles; n += 2) {
      float met[2][4], product[2][4];
      clear(met);
      clear(product);
#pragma unroll
      for (int k = 0; k < C::kDepths; ++k) {
        uint32_t x[4];
        ldmatrix_x4_trans(x, tile + C::chunk_at(kSide, 16 * k + (lane & 15), n + (lane >> 4)));
        const FragmentB b[2] = {{{x[0], x[1]}}, {{x[2], x[3]}}};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          E::multiply(met[j], p[k], where_not_finite<E>(b[j]));
          E::multiply(product[j], q[k], b[j]);
        }
      }
#pragma unroll
      for (int m = 0; m < C::kOutTiles; ++m) {  // registers have no index
        if (m / 2 * 2 != n) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (met[m % 2][e] > 0.0f) out[m][e] += product[m % 2][e];
        }
      }
    }
  }
};

template <class C>
__device__ inline void consume_noted(const HopperForward& p, const HopperPlaces<C>& at, int c) {
  RingPlace<C::kSlots> place;
  HopperUnit<C> unit;
  for (uint32_t parity = 0;; parity ^= 1) {
    mbarrier_wait(at.queries_full(c), parity);
    const HopperNote& note = at.note(c, parity);
    if (note.first < 0) return;
    skip_tiles<C>(at, place, note.before, int(threadIdx.x % kWarpThreads));
    unit.reset();
    if (note.tiles > 0) {
      const HopperLimits<C> limits = {p, at, note, c};
      mbarrier_wait(at.keys_full(place.slot), place.parity);
      begin_tiles<C>(at, unit, at.queries(c), place);
      add_tiles<C>(p, at, c, unit, limits, place, true);
      end_tiles<C, 0>(at, unit, place, true, limits.lane());
    } else {
      __syncwarp();  // all lanes have read the note
      release(at.queries_empty(c), int(threadIdx.x % kWarpThreads));
    }
    const uint32_t thread = thread_of_group();
    const int lane = int(thread % kWarpThreads);
    const int query = note.first + int(thread / kWarpThreads) * 16 + (lane >> 2);
    unit.finish(p, note.batch, note.head, note.sequence.query, query, note.sequence.queries, lane);
    skip_tiles<C>(at, place, note.after, lane);
  }
}

}  // namespace pmf::cuda
