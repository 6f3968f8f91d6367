// Attention backward of short heads with Hopper instructions: the mathematics and the registers of
// hopper_backward.cuh, but in one launch, for which all of a head's Q, G, K and V lie in shared
// memory. Each is read from memory once, and the row statistics never leave the multiprocessor.
//
// Blocks are persistent and process whole heads, queries as long as keys. Shared memory has three
// slots, each for Q and G or for K and V of a head: two of this head's, and one into which the next
// head's K and V are copied. Its Q and G replace this head's keys and values, as row blocks of them
// are done.
//
// The two consumers share the row blocks of queries, then those of keys: one begins with the first
// row block of queries, the other with the first of keys, so that if the number of row blocks is
// odd, both still have as many. The statistics have a barrier per tile, on which keys wait after
// their scores. During the results of a row block's last tile, the scores of the next row block's
// first tile are already queued, be it of queries or of keys: both are products of rows and a tile
// in the same layout.
//
// FLOPs: 8 products, 2 N N D each. Bytes: Q, K, V, G read and three gradients written, once. Bound:
// the tensor cores, closely followed by memory.
#pragma once

#include "cuda/attention/hopper_backward.cuh"

namespace pmf::cuda {

// The parameters of the launch.
struct HopperBackwardHeads {
  HopperMaps queries[kBackwardSides], keys[kBackwardSides];  // Q and G, K and V
  View4 grad_query, grad_key, grad_value;
  const float *lse, *grad_lse;  // [batch, heads, rows]; the second may be null
  int heads, rows;              // queries or keys per head
  int tiles, row_blocks;        // per head, of either
  int items;                    // batch times heads
  Divisor by_heads;
  float factor, scale;
};

template <typename T, int kWidth, int kColumns_, int kMostTiles_>
struct HopperHeadSizes : HopperShape<T, kWidth, kColumns_, kBackwardSides> {
  static_assert(kWidth == kPieceColumns, "rows of 128 bytes, so that tiles and row blocks overlap");
  static constexpr int kColumns = kColumns_, kMostTiles = kMostTiles_, kSlots = 3, kConsumers = 2;
  static constexpr int kMostRows = kMostTiles * kColumns;
  // Tiles and row blocks are ranges of a slot's rows.
  using Tile = HopperTile<kMostRows, 1, 0, kBackwardSides>;
  using Rows = Tile;
  static constexpr uint32_t kTileBytes = kColumns * HopperHeadSizes::kRowBytes;  // of one side
  // Shared memory: the slots, the statistics of this head and the next, the barriers.
  static constexpr uint32_t kFigures = kSlots * Tile::kBytes;
  static constexpr int kStatisticFloats = kStatistics<false> * kMostRows;
  static constexpr uint32_t kBarriers = kFigures + 2 * kStatisticFloats * 4;
  static constexpr int kSharedBytes = int(kBarriers) + 8 * (2 * kSlots + 2) * kMostTiles;
};

// Addresses in shared memory. `parity`: of a head's number.
template <class C>
struct HopperHeadPlaces {
  uint32_t base;

  __device__ uint32_t row(int slot, int row) const {
    return base + uint32_t(slot) * C::Tile::kBytes + uint32_t(row) * C::kRowBytes;
  }
  __device__ uint32_t tile(int slot, int tile) const { return row(slot, tile * C::kColumns); }
  __device__ static float* statistics(int parity) {
    return reinterpret_cast<float*>(swizzled_shared() + C::kFigures) + parity * C::kStatisticFloats;
  }

  __device__ uint32_t full(int slot, int tile) const { return barrier(slot, tile); }
  __device__ uint32_t empty(int slot, int tile) const { return barrier(C::kSlots + slot, tile); }
  // Whether the statistics of a tile's queries are stored.
  __device__ uint32_t stored(int parity, int tile) const {
    return barrier(2 * C::kSlots + parity, tile);
  }

 private:
  __device__ uint32_t barrier(int i, int tile) const {
    return base + C::kBarriers + 8 * uint32_t(i * C::kMostTiles + tile);
  }
};

__device__ inline HopperItem head_item(const HopperBackwardHeads& p, int item) {
  uint32_t batch = uint32_t(item);
  const int head = int(p.by_heads.divide(batch));
  return {int(batch), head, 0};
}

// ---- the copying warp ---------------------------------------------------------------------------

template <class C>
__device__ inline void copy_heads(const HopperBackwardHeads& p, const HopperHeadPlaces<C>& at) {
  RingPlace<C::kSlots> place;
  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x)) {
    const HopperItem here = head_item(p, item);
    for (int by_keys = 1; by_keys >= 0; --by_keys, place = place.next()) {
      const HopperMaps* const from = by_keys != 0 ? p.keys : p.queries;
      for (int j = 0; j < p.tiles; ++j) {
        const uint32_t full = at.full(place.slot, j), to = at.tile(place.slot, j);
        mbarrier_wait(at.empty(place.slot, j), place.parity ^ 1);
        mbarrier_expect(full, kBackwardSides * C::kTileBytes);
#pragma unroll
        for (int side = 0; side < kBackwardSides; ++side) {
          copy_box(to + C::Tile::piece(side, 0), &from[side].piece, full, 0, j * C::kColumns,
                   here.head, here.batch);
        }
      }
    }
  }
}

// ---- the consumers ------------------------------------------------------------------------------

// A row block of queries or of keys: its slot, and that of the tiles which stream past it.
template <class C>
struct HopperRowBlock {
  HopperItem here;
  RingPlace<C::kSlots> own, tiles;
  int row;  // the first one
};

// `keys`: the place of the head's keys and values; queries follow in the next. The last row block
// overlaps its predecessor, so as not to reach beyond the slot; it stores only its own rows.
template <class C>
__device__ inline HopperRowBlock<C> hopper_row_block(const HopperBackwardHeads& p, bool by_keys,
                                                     const HopperItem& here,
                                                     RingPlace<C::kSlots> keys, int number) {
  const RingPlace<C::kSlots> queries = keys.next();
  const int row = number * kRowBlock, last = p.tiles * C::kColumns - kRowBlock;
  return {here, by_keys ? keys : queries, by_keys ? queries : keys, row < last ? row : last};
}

// Waits for the row block and its first tile, and queues the tile's scores.
template <class C>
__device__ inline void begin_scores(HopperBackwardUnit<C>& unit, const HopperHeadPlaces<C>& at,
                                    const HopperRowBlock<C>& block) {
  const int first = block.row / C::kColumns, last = (block.row + kRowBlock - 1) / C::kColumns;
  mbarrier_wait(at.full(block.own.slot, first), block.own.parity);
  mbarrier_wait(at.full(block.own.slot, last), block.own.parity);
  mbarrier_wait(at.full(block.tiles.slot, 0), block.tiles.parity);
  unit.hold_scores();
  wgmma_fence();
  unit.multiply_scores(at.row(block.own.slot, block.row), at.tile(block.tiles.slot, 0));
  wgmma_commit();
}

// `of_warp`: the warp's first row of a row block. It and c are uniform across the warp, as far as
// the compiler can see.
template <class C>
__device__ inline void consume_heads(const HopperBackwardHeads& p, const HopperHeadPlaces<C>& at,
                                     int c, int of_warp) {
  using T = typename C::T;
  const int lane = int(threadIdx.x) % kWarpThreads, g = lane >> 2;
  const auto arrive = [&](uint32_t barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };
  // Arrives at the barriers of all tiles that satisfy the condition; `barrier`: the first one.
  const auto arrive_for = [&](auto condition, uint32_t barrier) {
#pragma unroll
    for (int j = 0; j < C::kMostTiles; ++j) {
      if (lane == 0 && condition(j)) mbarrier_arrive(barrier + 8 * uint32_t(j));
    }
  };
  HopperBackwardUnit<C> unit;
  RingPlace<C::kSlots> keys;  // of this head
  int i = 0;

  const HopperRowBlock<C> start =
      hopper_row_block<C>(p, false, head_item(p, int(blockIdx.x)), keys, c);
  float given = known(p, start.here, start.row + of_warp + g, p.rows, lane);
  begin_scores(unit, at, start);
  wgmma_wait<0>();
  unit.hold_scores();

  for (int item = int(blockIdx.x); item < p.items; item += int(gridDim.x), ++i) {
    const HopperItem here = head_item(p, item);
    // This consumer's row blocks of queries, or of keys. The first tile's scores are there.
    const auto process = [&](auto by_keys) {
      constexpr bool kByKeys = decltype(by_keys)::value;
      float* const statistics = at.statistics(i % 2);
      // Both passes' first row blocks would occupy registers throughout, and spill others.
      uint32_t turn = uint32_t(c);
      hold(turn);
      for (int r = int(turn ^ uint32_t(kByKeys)); r < p.row_blocks; r += 2) {
        const bool last = r + 2 >= p.row_blocks;
        const HopperRowBlock<C> block = hopper_row_block<C>(p, kByKeys, here, keys, r);
        const auto following = [&] {
          if (!last) return hopper_row_block<C>(p, kByKeys, here, keys, r + 2);
          if (!kByKeys) return hopper_row_block<C>(p, true, here, keys, int(turn ^ 1));
          if (item + int(gridDim.x) >= p.items) return block;  // nobody will use these scores
          return hopper_row_block<C>(p, false, head_item(p, item + int(gridDim.x)),
                                     keys.next().next(), c);
        };
        const int row = block.row + of_warp + g;
        const auto wait_for_statistics = [&](int j) {
          if constexpr (kByKeys) mbarrier_wait(at.stored(i % 2, j), uint32_t(i / 2) & 1);
        };
        const auto differentiate = [&](int j) {
          unit.template differentiate<kByKeys, false>(
              p, p.rows - j * C::kColumns, statistics + j * C::kColumns, C::kMostRows, lane);
        };
        if constexpr (!kByKeys) unit.expect(given, lane);
        wait_for_statistics(0);
        unit.template differentiate<kByKeys, true>(p, p.rows, statistics, C::kMostRows, lane);
        if constexpr (!kByKeys) unit.move_mean();
        unit.pack();
#pragma unroll 1
        for (int j = 1; j < p.tiles; ++j) {
          mbarrier_wait(at.full(block.tiles.slot, j), block.tiles.parity);
          unit.hold_scores();
          wgmma_fence();
          unit.multiply_scores(at.row(block.own.slot, block.row), at.tile(block.tiles.slot, j));
          wgmma_commit();
          unit.hold_results();
          if constexpr (!kByKeys) {
            unit.move_sums();
            unit.add_up();
          }
          wgmma_fence();
          unit.template multiply_results<kByKeys>(at.tile(block.tiles.slot, j - 1), j == 1);
          wgmma_commit();
          wait_for_statistics(j);
          wgmma_wait<1>();
          unit.hold_scores();
          differentiate(j);
          unit.hold_scores();
          wgmma_wait<0>();
          unit.hold_results();
          if (kByKeys && last) arrive(at.empty(block.tiles.slot, j - 1));
          if constexpr (!kByKeys) unit.move_mean();
          unit.pack();
        }

        const int begin = r * kRowBlock, end = last ? p.tiles * C::kColumns : begin + kRowBlock;
        const bool own = block.row + of_warp >= begin;  // not its predecessor's rows
        if constexpr (kByKeys) {
          // Rows before this consumer's next row block are not needed any more.
          const int free = last ? end : end + kRowBlock;
          arrive_for(
              [&](int j) {
                const int tile_end = (j + 1) * C::kColumns;
                return tile_end > (r < 2 ? 0 : begin) && tile_end <= free;
              },
              at.empty(keys.slot, 0));
        } else {
          if (own) unit.store_statistics(p, statistics, C::kMostRows, row, p.rows, lane);
          __syncwarp();
          arrive_for(
              [&](int j) {
                return (j + 1) * C::kColumns > begin && j * C::kColumns < begin + kRowBlock &&
                       j < p.tiles;
              },
              at.stored(i % 2, 0));
        }

        const HopperRowBlock<C> next = following();
        given = known(p, next.here, next.row + of_warp + g, p.rows, lane);
        begin_scores(unit, at, next);
        unit.hold_results();
        if constexpr (!kByKeys) {
          unit.move_sums();
          unit.add_up();
        }
        wgmma_fence();
        unit.template multiply_results<kByKeys>(at.tile(block.tiles.slot, p.tiles - 1),
                                                p.tiles == 1);
        wgmma_commit();
        wgmma_wait<0>();
        unit.hold_scores();
        unit.hold_results();
        if (kByKeys && last) arrive(at.empty(block.tiles.slot, p.tiles - 1));
        if constexpr (!kByKeys) unit.finish_queries(p, lane);
        if (own) {
          const auto store = [&](const auto& sums, const View4& view) {
            store_gradient<T>(sums, view, block.here, row, p.rows, lane);
          };
          if (kByKeys) store(unit.x, p.grad_value);
          store(unit.y, kByKeys ? p.grad_key : p.grad_query);
        }
      }
    };
    process(std::false_type{});
    process(std::true_type{});
    keys = keys.next().next();
  }
}

template <class C>
__global__ void __launch_bounds__(3 * kGroupThreads, 1)
    hopper_backward_heads_kernel(const __grid_constant__ HopperBackwardHeads p) {
  const HopperHeadPlaces<C> at = {shared_address(swizzled_shared())};
  if (threadIdx.x == 0) {
    constexpr uint32_t kWarpsOfGroup = 4;
    for (int j = 0; j < p.tiles; ++j) {
      for (int slot = 0; slot < C::kSlots; ++slot) {
        mbarrier_init(at.full(slot, j), 1);
        mbarrier_init(at.empty(slot, j), C::kConsumers * kWarpsOfGroup);
      }
      // The row blocks that have any of the tile's rows.
      const int begin = j * C::kColumns / kRowBlock, end = ((j + 1) * C::kColumns - 1) / kRowBlock;
      const int count = (end < p.row_blocks ? end + 1 : p.row_blocks) - begin;
      for (int parity = 0; parity < 2; ++parity) {
        mbarrier_init(at.stored(parity, j), uint32_t(count) * kWarpsOfGroup);
      }
    }
    mbarrier_init_fence();
  }
  // Entries past the last row block: see copy_statistics().
  for (int k = int(threadIdx.x); k < 2 * C::kStatisticFloats; k += int(blockDim.x)) {
    at.statistics(0)[k] = 0.0f;
  }
  __syncthreads();
  // Uniform across the warp, and the shuffle lets the compiler know.
  const int warp = shuffle_idx(int(threadIdx.x) / kWarpThreads, 0);
  if (warp < 4) {
    registers_down_to<24>();
    if (warp == 0 && elect_one()) copy_heads<C>(p, at);
  } else {
    registers_up_to<240>();
    consume_heads<C>(p, at, warp / 4 - 1, warp % 4 * 16);
  }
}

}  // namespace pmf::cuda
