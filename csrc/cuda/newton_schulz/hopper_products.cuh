// The products of Newton-Schulz with Hopper instructions (hopper.cuh): what product_kernel computes
// (newton_schulz_products.cuh), for 16-bit operands.
//
// Blocks are persistent and process tiles of 128 x 256. A block has three warpgroups. Two of them,
// the consumers, multiply 64 rows each, with 128 accumulators per thread. The other one gives up
// its registers: one warp copies boxes of 64 x 64 by tensor map into a ring, whose slots hold 64
// columns of `left` and of `right`; two warps, one per consumer, store results. A consumer rounds
// its results to its own 32 KB of shared memory and continues with its next tile, while its storing
// warp writes them out in whole sectors. Where `left` is added, the copying warp has put its values
// in their place.
//
// A symmetric product computes the tiles that touch the lower triangle and stores boxes below the
// diagonal twice, as computed and mirrored; those above it are dropped. Items come in pairs, the
// halves of a square of 256 x 256.
//
// Bound: the tensor cores take 256 cycles per 16 columns of the depth, in which 12 KB come from L2
// and 20 KB of operands are read from shared memory, of 32 that it could deliver.
#pragma once

#include "cuda/common/hopper_ring.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/newton_schulz/newton_schulz_plan.h"

namespace pmf::cuda::ns {

constexpr int kBoxSide = 64;
constexpr uint32_t kBoxRowBytes = 2 * kBoxSide, kBoxBytes = kBoxSide * kBoxRowBytes;
constexpr int kHopperConsumers = 2, kHopperThreads = (1 + kHopperConsumers) * kGroupThreads;
constexpr int kHopperRows = kHopperConsumers * kBoxSide, kHopperSquare = 256;
constexpr int kLeftBoxes = kHopperRows / kBoxSide, kRightBoxes = kHopperSquare / kBoxSide;
constexpr int kHopperSlots = 3;
constexpr uint32_t kHopperSlotBytes = (kLeftBoxes + kRightBoxes) * kBoxBytes;
// Shared memory: the ring, the results of each consumer, the barriers.
constexpr uint32_t kHopperResults = kHopperSlots * kHopperSlotBytes;
constexpr uint32_t kHopperBarriers = kHopperResults + kHopperConsumers * kRightBoxes * kBoxBytes;
constexpr int kHopperSharedBytes =
    int(kHopperBarriers) + 8 * (2 * kHopperSlots + 3 * kHopperConsumers);

struct HopperProduct {
  TensorMap left, right;  // boxes of 64 x 64
  Product product;
  int first_item;
  int down, across;  // squares of a result
};

// The kernel's parameter.
struct HopperWave {
  HopperProduct products[kMaxProducts];
  int count, items;
};
static_assert(sizeof(HopperWave) < 32 << 10, "kernel parameters");

// Whether a product stores its box at (row, column), rather than none or only the mirrored one.
__device__ inline bool stores_box(const Product& p, int row, int column) {
  return row < p.m && column < p.n && (!p.symmetric || column <= row);
}

// A block's tile.
struct HopperTileOfWave {
  const HopperProduct* of;
  int matrix;  // within the product
  int row, column;

  __device__ HopperTileOfWave(const HopperWave& wave, int item) {
    int index = wave.count - 1;
    while (item < wave.products[index].first_item) --index;
    of = &wave.products[index];
    const int down = of->down;
    const bool symmetric = of->product.symmetric;
    const int each = symmetric ? down * (down + 1) / 2 : down * of->across;
    item -= of->first_item;
    const int half = item % 2;
    int square = item / 2;
    matrix = square / each;
    square -= matrix * each;
    int r = square % down, c = square / down;
    if (symmetric) {  // row r of the triangle starts at r (r + 1) / 2
      r = 0;
      while ((r + 1) * (r + 2) / 2 <= square) ++r;
      c = square - r * (r + 1) / 2;
    }
    row = r * kHopperSquare + half * kHopperRows;
    column = c * kHopperSquare;
  }

  // Calls `process` for each tile of this block.
  template <typename Process>
  __device__ static void each(const HopperWave& wave, const Process& process) {
    for (int item = int(blockIdx.x); item < wave.items; item += int(gridDim.x)) {
      const HopperTileOfWave tile(wave, item);
      if (tile.row < tile.of->product.m) process(tile);
    }
  }
};

// Addresses in shared memory, from `base` on.
struct HopperPlaces {
  uint32_t base;

  __device__ uint32_t left(int slot) const { return base + uint32_t(slot) * kHopperSlotBytes; }
  __device__ uint32_t right(int slot) const { return left(slot) + kLeftBoxes * kBoxBytes; }
  __device__ static uint32_t result(int consumer, int box) {  // from `base`
    return kHopperResults + uint32_t(consumer * kRightBoxes + box) * kBoxBytes;
  }

  __device__ uint32_t full(int slot) const { return barrier(slot); }
  __device__ uint32_t empty(int slot) const { return barrier(kHopperSlots + slot); }
  // Of a consumer's results: they may be written, they have been written, they have been stored.
  __device__ uint32_t ready(int c) const { return barrier(2 * kHopperSlots + c); }
  __device__ uint32_t written(int c) const {
    return barrier(2 * kHopperSlots + kHopperConsumers + c);
  }
  __device__ uint32_t stored(int c) const {
    return barrier(2 * kHopperSlots + 2 * kHopperConsumers + c);
  }

 private:
  __device__ uint32_t barrier(int i) const { return base + kHopperBarriers + 8 * uint32_t(i); }
};

// The offset of a 16-byte chunk in a box.
__device__ inline uint32_t chunk_of_box(int row, int chunk) {
  return uint32_t(row) * kBoxRowBytes + uint32_t((chunk ^ row) & 7) * 16;
}

// ---- the copying warp ---------------------------------------------------------------------------

__device__ inline void copy_operands(const HopperWave& wave, const HopperPlaces& at) {
  RingPlace<kHopperSlots> place;
  uint32_t parity = 0;
  HopperTileOfWave::each(wave, [&](const HopperTileOfWave& tile) {
    const HopperProduct& of = *tile.of;
    const Product& p = of.product;
    for (int k = 0; k < p.k; k += kBoxSide, place = place.next()) {
      const uint32_t full = at.full(place.slot);
      mbarrier_wait(at.empty(place.slot), place.parity ^ 1);
      mbarrier_expect(full, kHopperSlotBytes);
#pragma unroll
      for (int i = 0; i < kLeftBoxes; ++i) {
        copy_box(at.left(place.slot) + i * kBoxBytes, &of.left, full, k, tile.row + i * kBoxSide,
                 tile.matrix, 0);
      }
#pragma unroll
      for (int i = 0; i < kRightBoxes; ++i) {
        const int n = tile.column + i * kBoxSide;
        copy_box(at.right(place.slot) + i * kBoxBytes, &of.right, full, p.right_transposed ? k : n,
                 p.right_transposed ? n : k, tile.matrix, 0);
      }
    }
    for (int c = 0; c < kHopperConsumers; ++c) {
      const int row = tile.row + c * kBoxSide;
      mbarrier_wait(at.stored(c), parity ^ 1);
      int boxes = 0;
      for (int i = 0; i < kRightBoxes; ++i) {
        boxes += p.addend != 0 && stores_box(p, row, tile.column + i * kBoxSide);
      }
      mbarrier_expect(at.ready(c), boxes * kBoxBytes);
      for (int i = 0; i < boxes; ++i) {
        copy_box(at.base + at.result(c, i), &of.left, at.ready(c), tile.column + i * kBoxSide, row,
                 tile.matrix, 0);
      }
    }
    parity ^= 1;
  });
}

// ---- the storing warps --------------------------------------------------------------------------

template <typename T>
__device__ inline void store_results(const HopperWave& wave, const HopperPlaces& at,
                                     const unsigned char* shared, int c) {
  const int lane = int(threadIdx.x) % kWarpThreads, g = lane / 4, t = lane % 4;
  uint32_t parity = 0;
  HopperTileOfWave::each(wave, [&](const HopperTileOfWave& tile) {
    const Product& p = tile.of->product;
    const int row = tile.row + c * kBoxSide;
    T* const out = static_cast<T*>(p.out) + int64_t(tile.matrix) * p.m * p.n;
    mbarrier_wait(at.written(c), parity);
#pragma unroll 1
    for (int i = 0; i < kRightBoxes; ++i) {
      const int column = tile.column + i * kBoxSide;
      if (!stores_box(p, row, column)) continue;
      const unsigned char* const box = shared + at.result(c, i);
      // A warp stores four rows at once.
      T* to = out + int64_t(row + lane / 8) * p.n + column + lane % 8 * 8;
#pragma unroll 4
      for (int r = lane / 8; r < kBoxSide; r += 4, to += 4 * p.n) {
        const auto* from = reinterpret_cast<const T*>(box + chunk_of_box(r, lane % 8));
        store_vector(to, load_vector<T, 8>(from));
      }
      if (!p.symmetric || column == row) continue;
      // Or eight rows of 32 columns of the mirrored box. In a matrix of ldmatrix, r and r + 1 of
      // each pair of rows are those of pair (j + r / 2) % 4 in rows 8 (r / 2) and on, so that a
      // lane receives eight adjacent rows of its column and no two rows share banks.
      to = out + int64_t(column + g) * p.n + row + 8 * t;
      const int pair = lane % 8 / 2, j = lane / 8;
      const int source = 8 * pair + 2 * ((j + pair) % 4) + lane % 2;
#pragma unroll 2
      for (int chunk = 0; chunk < kBoxSide / 8; ++chunk, to += 8 * p.n) {
#pragma unroll
        for (int half = 0; half < kBoxSide; half += 32) {
          uint32_t r[4];
          ldmatrix_x4_trans(r, box + chunk_of_box(source + half, chunk));
          const bool by_one = (t & 1) != 0, by_two = (t & 2) != 0;
          const uint32_t turned[4] = {by_one ? r[3] : r[0], by_one ? r[0] : r[1],
                                      by_one ? r[1] : r[2], by_one ? r[2] : r[3]};
          Vector<uint32_t, 4> whole;
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            whole.element[q] = by_two ? turned[(q + 2) % 4] : turned[q];
          }
          store_vector(reinterpret_cast<uint32_t*>(to + half), whole);
        }
      }
    }
    // The copying warp may overwrite the results.
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(at.stored(c));
    parity ^= 1;
  });
}

// ---- the consumers ------------------------------------------------------------------------------

using HopperSums = float[kHopperSquare / 8][4];

template <typename T, bool kTransposed>
__device__ inline void multiply_depth(HopperSums& d, const HopperPlaces& at,
                                      RingPlace<kHopperSlots>& place, int c, int slots) {
  const bool releases = threadIdx.x % kWarpThreads == 0;
  const auto multiply = [&](bool adds) {
    mbarrier_wait(at.full(place.slot), place.parity);
    hold(d);
    wgmma_fence();
    const uint64_t a = matrix_descriptor(at.left(place.slot) + uint32_t(c) * kBoxBytes, 0,
                                         8 * kBoxRowBytes, Swizzle::bytes128);
    const uint64_t b =
        matrix_descriptor(at.right(place.slot), kBoxBytes, 8 * kBoxRowBytes, Swizzle::bytes128);
#pragma unroll
    for (int i = 0; i < kBoxSide / 16; ++i) {
      wgmma<T, !kTransposed>(d, a + further(32 * i),
                             b + further(kTransposed ? 32 * i : 16 * i * kBoxRowBytes),
                             adds || i > 0);
    }
    wgmma_commit();
  };
  multiply(false);
#pragma unroll 1
  for (int slot = 1; slot < slots; ++slot) {
    const int before = place.slot;
    place = place.next();
    multiply(true);
    wgmma_wait<1>();
    if (releases) mbarrier_arrive(at.empty(before));
  }
  wgmma_wait<0>();
  hold(d);
  if (releases) mbarrier_arrive(at.empty(place.slot));
  place = place.next();
}

// Writes the results at (row, column) and on, of a consumer's rows, in shared memory.
template <typename T>
__device__ inline void write_results(const HopperSums& d, const Product& p, unsigned char* results,
                                     int row, int column) {
  const int lane = int(threadIdx.x) % kWarpThreads, g = lane / 4, t = lane % 4;
  const int first = int(threadIdx.x) % kGroupThreads / kWarpThreads * 16 + g;  // row of the box
  const auto value = [&](float sum, const T* old, int i, int j) {
    float x = p.factor * sum;
    if (p.addend != 0) x = fmaf(p.addend, to_float(*old), x);
    return i == j && i < p.rows ? x + p.identity : x;
  };
#pragma unroll
  for (int box = 0; box < kRightBoxes; ++box, results += kBoxBytes, column += kBoxSide) {
    if (!stores_box(p, row, column)) continue;
    const bool on_diagonal = p.symmetric && row == column;
#pragma unroll
    for (int n = 0; n < kBoxSide / 8; ++n) {
      const float (&sums)[4] = d[box * kBoxSide / 8 + n];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const int i = first + 8 * q, j = 8 * n + 2 * t;
        T* const to = reinterpret_cast<T*>(results + chunk_of_box(i, n)) + 2 * t;
        if (!on_diagonal) {
          Vector<T, 2> old{}, both;
          if (p.addend != 0) old = load_vector<T, 2>(to);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            both.element[e] =
                from_float<T>(value(sums[2 * q + e], &old.element[e], row + i, column + j + e));
          }
          *reinterpret_cast<Vector<T, 2>*>(to) = both;
          continue;
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (i < j + e) continue;
          const T rounded = from_float<T>(value(sums[2 * q + e], to + e, row + i, row + j + e));
          to[e] = rounded;
          reinterpret_cast<T*>(results + chunk_of_box(j + e, i / 8))[i % 8] = rounded;
        }
      }
    }
  }
}

template <typename T>
__device__ inline void consume(const HopperWave& wave, const HopperPlaces& at,
                               unsigned char* shared, int c) {
  RingPlace<kHopperSlots> place;
  uint32_t parity = 0;
  HopperSums d;
  HopperTileOfWave::each(wave, [&](const HopperTileOfWave& tile) {
    const Product& p = tile.of->product;
    if (p.right_transposed) {
      multiply_depth<T, true>(d, at, place, c, p.k / kBoxSide);
    } else {
      multiply_depth<T, false>(d, at, place, c, p.k / kBoxSide);
    }
    mbarrier_wait(at.ready(c), parity);
    write_results<T>(d, p, shared + at.result(c, 0), tile.row + c * kBoxSide, tile.column);
    __syncwarp();
    if (threadIdx.x % kWarpThreads == 0) mbarrier_arrive(at.written(c));
    parity ^= 1;
  });
}

template <typename T>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_product_kernel(const __grid_constant__ HopperWave wave) {
  unsigned char* const shared = swizzled_shared();
  const HopperPlaces at = {shared_address(shared)};
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kHopperSlots; ++slot) {
      mbarrier_init(at.full(slot), 1);
      mbarrier_init(at.empty(slot), kHopperConsumers * kGroupWarps);
    }
    for (int c = 0; c < kHopperConsumers; ++c) {
      mbarrier_init(at.ready(c), 1);
      mbarrier_init(at.written(c), kGroupWarps);
      mbarrier_init(at.stored(c), 1);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  // Uniform across the warp, and the shuffle lets the compiler know.
  const int warp = shuffle_idx(int(threadIdx.x) / kWarpThreads, 0);
  if (warp < kGroupWarps) {
    registers_down_to<40>();
    if (warp == 0) {
      if (elect_one()) copy_operands(wave, at);
    } else if (warp <= kHopperConsumers) {
      store_results<T>(wave, at, shared, warp - 1);
    }
  } else {
    registers_up_to<232>();
    consume<T>(wave, at, shared, warp / kGroupWarps - 1);
  }
}

}  // namespace pmf::cuda::ns
