// The products of Newton-Schulz with Hopper instructions (hopper.cuh): what product_kernel computes
// (newton_schulz_products.cuh), for 16-bit operands.
//
// Blocks are persistent and process tiles of 128 x 256; clusters of two process squares of 256 x
// 256. Both blocks of a cluster need the same rows or columns of `right`: each copies half of them,
// to both. A slot may be filled once the consumers of both have read it. A block has three
// warpgroups. Two of them, the consumers, multiply 64 rows each, with 128 accumulators per thread.
// The other one gives up its registers: one warp copies boxes of 64 x 64 by tensor map into a ring,
// whose slots hold 64 columns of `left` and of `right`; two warps, one per consumer, store results.
// A consumer rounds its results to its own 32 KB of shared memory and continues with its next tile,
// while its storing warp writes them out in whole sectors.
//
// A symmetric product computes the tiles that touch the lower triangle and stores boxes below the
// diagonal twice, as computed and mirrored; those above it are dropped. Where `left` is added, its
// boxes are saved from the ring to where the results will be.
//
// The last wave has a kernel of its own: hopper_updates.cuh.
//
// Bound: the tensor cores take 256 cycles per 16 columns of the depth, in which a block takes 8 KB
// from L2 and reads 20 KB of operands from shared memory, of 32 that it could deliver.
#pragma once

#include "cuda/common/gemm_tile.cuh"
#include "cuda/common/hopper_ring.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/newton_schulz/newton_schulz_plan.h"

namespace pmf::cuda::ns {

constexpr int kBoxSide = 64;
constexpr uint32_t kBoxRowBytes = 2 * kBoxSide, kBoxBytes = kBoxSide * kBoxRowBytes;
constexpr int kHopperConsumers = 2, kHopperThreads = (1 + kHopperConsumers) * kGroupThreads;
constexpr int kHopperRows = kHopperConsumers * kBoxSide, kHopperSquare = 256;
constexpr int kLeftBoxes = kHopperRows / kBoxSide, kRightBoxes = kHopperSquare / kBoxSide;
constexpr unsigned kHopperCluster = kHopperSquare / kHopperRows;
constexpr int kHopperSlots = 3;
constexpr uint32_t kHopperSlotBytes = (kLeftBoxes + kRightBoxes) * kBoxBytes;
// Shared memory: the ring, the results of each consumer, the barriers.
constexpr uint32_t kHopperResults = kHopperSlots * kHopperSlotBytes;
constexpr uint32_t kHopperBarriers = kHopperResults + kHopperConsumers * kRightBoxes * kBoxBytes;
constexpr int kHopperSharedBytes =
    int(kHopperBarriers) + 8 * (2 * kHopperSlots + 2 * kHopperConsumers);

struct HopperProduct {
  TensorMap left, right;  // boxes of 64 x 64
  Product product;
  int first_square;
  int down, across;  // squares of a result
};

template <int kMost>
struct HopperWaveOf {
  HopperProduct products[kMost];
  int count, squares;
};
using HopperWave = HopperWaveOf<kMaxProducts>;

// Whether a product stores its box at (row, column), rather than none or only the mirrored one.
__device__ inline bool stores_box(const Product& p, int row, int column) {
  return row < p.m && column < p.n && (!p.symmetric || column <= row);
}

// This block's index in its cluster.
__device__ inline int cluster_rank() { return int(blockIdx.x % kHopperCluster); }

// A block's tile.
struct HopperTileOfWave {
  const HopperProduct* of;
  int matrix;  // within the product
  int row, column;
  float factor;
  bool shares_rows;  // `left` is `right`, and the tile's rows are among its columns
  // Where `left` is added, the depth begins behind the tile's own columns and ends with them, so
  // that their boxes of `left` are in the last `addends` slots.
  int first_k, addends;

  template <typename Wave>
  __device__ HopperTileOfWave(const Wave& wave, int square) {
    int index = wave.count - 1;
    while (square < wave.products[index].first_square) --index;
    of = &wave.products[index];
    const int down = of->down;
    const bool symmetric = of->product.symmetric;
    const int each = symmetric ? down * (down + 1) / 2 : down * of->across;
    square -= of->first_square;
    matrix = square / each;
    square -= matrix * each;
    factor = of->product.factor_of(matrix);
    int r = square % down, c = square / down;
    if (symmetric) {  // row r of the triangle starts at r (r + 1) / 2
      r = 0;
      while ((r + 1) * (r + 2) / 2 <= square) ++r;
      c = square - r * (r + 1) / 2;
    }
    row = r * kHopperSquare + cluster_rank() * kHopperRows;
    column = c * kHopperSquare;
    const Product& p = of->product;
    shares_rows = symmetric && r == c && p.left == p.right;
    const int behind = min(column + kHopperSquare, p.k);
    first_k = p.adds_left() && behind < p.k ? behind : 0;
    addends = p.adds_left() ? (behind - column) / kBoxSide : 0;
  }
};

// The squares of a cluster, one after the other.
__device__ inline int first_square() { return int(blockIdx.x / kHopperCluster); }
__device__ inline int squares_at_once() { return int(gridDim.x / kHopperCluster); }

// Calls `process` for each tile of this block.
template <typename Wave, typename Process>
__device__ inline void for_each_tile(const Wave& wave, const Process& process) {
  for (int square = first_square(); square < wave.squares; square += squares_at_once()) {
    process(HopperTileOfWave(wave, square));
  }
}

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
  // A consumer's results have been written, and have been stored.
  __device__ uint32_t written(int c) const { return barrier(2 * kHopperSlots + c); }
  __device__ uint32_t stored(int c) const {
    return barrier(2 * kHopperSlots + kHopperConsumers + c);
  }

 private:
  __device__ uint32_t barrier(int i) const { return base + kHopperBarriers + 8 * uint32_t(i); }
};

// The offset of a 16-byte chunk in a box.
__device__ inline uint32_t chunk_of_box(int row, int chunk) {
  return uint32_t(row) * kBoxRowBytes + uint32_t((chunk ^ row) & 7) * 16;
}

// Uniform across the warp, and the shuffle lets the compiler know.
__device__ inline int warp_of_block() { return shuffle_idx(int(threadIdx.x) / kWarpThreads, 0); }

// ---- the copying warp ---------------------------------------------------------------------------

// beside(tile) returns what is called once for each slot of the tile.
template <typename Wave, typename Beside>
__device__ inline void copy_operands(const Wave& wave, const HopperPlaces& at,
                                     const Beside& beside) {
  constexpr int kShare = kRightBoxes / int(kHopperCluster);
  constexpr uint16_t kAll = (1 << kHopperCluster) - 1;
  RingPlace<kHopperSlots> place;
  for_each_tile(wave, [&](const HopperTileOfWave& tile) {
    const HopperProduct& of = *tile.of;
    const Product& p = of.product;
    auto more = beside(tile);
    int k = tile.first_k;
    for (int left = p.k; left > 0; left -= kBoxSide, place = place.next()) {
      const uint32_t full = at.full(place.slot);
      mbarrier_wait(at.empty(place.slot), place.parity ^ 1);
      mbarrier_expect(full, tile.shares_rows ? kRightBoxes * kBoxBytes : kHopperSlotBytes);
#pragma unroll
      for (int i = 0; i < kLeftBoxes; ++i) {
        if (tile.shares_rows) break;
        copy_box(at.left(place.slot) + i * kBoxBytes, &of.left, full, k, tile.row + i * kBoxSide,
                 tile.matrix, 0);
      }
#pragma unroll
      for (int share = 0; share < kShare; ++share) {
        const int i = cluster_rank() * kShare + share, n = tile.column + i * kBoxSide;
        copy_box_to_blocks(at.right(place.slot) + uint32_t(i) * kBoxBytes, &of.right, full,
                           p.right_transposed ? k : n, p.right_transposed ? n : k, tile.matrix, 0,
                           kAll);
      }
      k = k + kBoxSide < p.k ? k + kBoxSide : 0;
      more();
    }
  });
}

// ---- the storing warps --------------------------------------------------------------------------

// Eight rows of a column, and the three columns beside it, for each lane: those of column
// 8 chunk + lane / 4, from row `first` + 8 (lane % 4) on.
//
// In a matrix of ldmatrix, r and r + 1 of each pair of rows are those of pair (j + r / 2) % 4 of
// rows 8 (r / 2) and on, so that a lane receives adjacent rows and no two rows share banks.
__device__ inline Vector<uint32_t, 4> load_column(const unsigned char* box, int first, int chunk) {
  const int lane = int(threadIdx.x) % kWarpThreads;
  const int pair = lane % 8 / 2, j = lane / 8;
  uint32_t r[4];
  ldmatrix_x4_trans(r,
                    box + chunk_of_box(first + 8 * pair + 2 * ((j + pair) % 4) + lane % 2, chunk));
  const bool by_one = (lane & 1) != 0, by_two = (lane & 2) != 0;
  const uint32_t turned[4] = {by_one ? r[3] : r[0], by_one ? r[0] : r[1], by_one ? r[1] : r[2],
                              by_one ? r[2] : r[3]};
  Vector<uint32_t, 4> whole;
#pragma unroll
  for (int q = 0; q < 4; ++q) whole.element[q] = by_two ? turned[(q + 2) % 4] : turned[q];
  return whole;
}

// Stores a box of 64 x 64 in `out`, row by row, whole or below the diagonal: chunks left of the one
// with the diagonal.
template <typename T>
__device__ inline void store_box(T* out, int stride, const unsigned char* box, bool below) {
  const int lane = int(threadIdx.x) % kWarpThreads, chunk = lane % 8;
  T* to = out + int64_t(lane / 8) * stride + 8 * chunk;
  constexpr int kBatch = 4;
#pragma unroll 1
  for (int first = lane / 8; first < kBoxSide; first += 4 * kBatch) {
    Vector<T, 8> values[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const unsigned char* const from = box + chunk_of_box(first + 4 * i, chunk);
      values[i] = load_vector<T, 8>(reinterpret_cast<const T*>(from));
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i, to += 4 * stride) {
      if (!below || chunk < (first + 4 * i) / 8) store_vector(to, values[i]);
    }
  }
}

// Stores the mirror image of a box, or of its part below the diagonal, with the diagonal.
template <typename T>
__device__ inline void store_mirrored_box(T* out, int stride, const unsigned char* box,
                                          bool below) {
  const int lane = int(threadIdx.x) % kWarpThreads, g = lane / 4;
  T* to = out + int64_t(g) * stride + 8 * (lane % 4);
#pragma unroll 1
  for (int chunk = 0; chunk < kBoxSide / 8; ++chunk, to += 8 * stride) {
    Vector<uint32_t, 4> values[2] = {load_column(box, 0, chunk), load_column(box, 32, chunk)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int across = 4 * half + lane % 4;
      if (below && across == chunk) {
        const auto row = load_vector<uint32_t, 4>(
            reinterpret_cast<const uint32_t*>(box + chunk_of_box(8 * chunk + g, chunk)));
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const uint32_t below_diagonal = 2 * q + 1 <= g ? ~0u : 2 * q <= g ? 0xffffu : 0;
          uint32_t& both = values[half].element[q];
          both = (row.element[q] & below_diagonal) | (both & ~below_diagonal);
        }
      }
      if (!below || across >= chunk) {
        store_vector(reinterpret_cast<uint32_t*>(to + 32 * half), values[half]);
      }
    }
  }
}

template <typename T>
__device__ inline void store_results(const HopperWave& wave, const HopperPlaces& at,
                                     const unsigned char* shared, int c) {
  uint32_t parity = 0;
  for_each_tile(wave, [&](const HopperTileOfWave& tile) {
    const Product& p = tile.of->product;
    const int row = tile.row + c * kBoxSide;
    T* const out = static_cast<T*>(p.out) + int64_t(tile.matrix) * p.m * p.n;
    mbarrier_wait(at.written(c), parity);
#pragma unroll 1
    for (int i = 0; i < kRightBoxes; ++i) {
      const int column = tile.column + i * kBoxSide;
      if (!stores_box(p, row, column)) break;
      const unsigned char* const box = shared + at.result(c, i);
      const bool on_diagonal = p.symmetric && row == column;
      store_box(out + int64_t(row) * p.n + column, p.n, box, on_diagonal);
      if (p.symmetric) {
        store_mirrored_box(out + int64_t(column) * p.n + row, p.n, box, on_diagonal);
      }
    }
    __syncwarp();
    if (threadIdx.x % kWarpThreads == 0) mbarrier_arrive(at.stored(c));
    parity ^= 1;
  });
}

// ---- the consumers ------------------------------------------------------------------------------

using HopperSums = float[kHopperSquare / 8][4];

// A consumer of this block, and its place in the ring.
struct HopperConsumer {
  HopperPlaces at;
  int c;
  RingPlace<kHopperSlots> place;

  // The consumer's rows in the slot.
  __device__ uint32_t rows(bool shares_rows) const {
    const uint32_t first =
        shares_rows ? at.right(place.slot) + uint32_t(cluster_rank() * kLeftBoxes) * kBoxBytes
                    : at.left(place.slot);
    return first + uint32_t(c) * kBoxBytes;
  }

  // Queues the products of a slot.
  template <typename T, bool kTransposed>
  __device__ void multiply(HopperSums& d, bool shares_rows, bool adds) {
    mbarrier_wait(at.full(place.slot), place.parity);
    hold(d);
    wgmma_fence();
    const uint64_t a = matrix_descriptor(rows(shares_rows), 0, 8 * kBoxRowBytes, Swizzle::bytes128);
    const uint64_t b =
        matrix_descriptor(at.right(place.slot), kBoxBytes, 8 * kBoxRowBytes, Swizzle::bytes128);
#pragma unroll
    for (int i = 0; i < kBoxSide / 16; ++i) {
      wgmma<T, !kTransposed>(d, a + further(32 * i),
                             b + further(kTransposed ? 32 * i : 16 * i * kBoxRowBytes),
                             adds || i > 0);
    }
    wgmma_commit();
  }

  // Of each warp, one lane releases the slot in one block of the cluster.
  __device__ void release(int slot) const {
    const uint32_t lane = threadIdx.x % kWarpThreads;
    if (lane < kHopperCluster) mbarrier_arrive_in_cluster(peer_address(at.empty(slot), lane));
  }

  // Multiplies all slots of a tile; meanwhile(slots left, rows) is called for each.
  template <typename T, bool kTransposed, typename Meanwhile>
  __device__ void multiply_all(HopperSums& d, bool shares_rows, int slots,
                               const Meanwhile& meanwhile) {
    multiply<T, kTransposed>(d, shares_rows, false);
    meanwhile(slots, rows(shares_rows));
#pragma unroll 1
    for (int left = slots - 1; left > 0; --left) {
      const int before = place.slot;
      place = place.next();
      multiply<T, kTransposed>(d, shares_rows, true);
      meanwhile(left, rows(shares_rows));
      wgmma_wait<1>();
      release(before);
    }
    wgmma_wait<0>();
    hold(d);
    release(place.slot);
    place = place.next();
  }
};

// Writes a box of a consumer's results, eight columns for each element of d, in shared memory; if
// kAdds, `left` is there. `diagonal`: of the box's rows, those that have an element on the
// diagonal.
template <typename T, bool kAdds, bool kDiagonal>
__device__ inline void write_box(const float (*d)[4], const Product& p, unsigned char* box,
                                 float factor, int diagonal) {
  const int lane = int(threadIdx.x) % kWarpThreads, g = lane / 4, t = lane % 4;
  const int warp = int(threadIdx.x) % kGroupThreads / kWarpThreads, first = 16 * warp + g;
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    // Where this row's element on the diagonal is, if it is this lane's.
    const int i = first + 8 * q, eight = i < diagonal && t == g / 2 ? 2 * warp + q : -1;
#pragma unroll
    for (int n = 0; n < kBoxSide / 8; ++n) {
      T* const to = reinterpret_cast<T*>(box + chunk_of_box(i, n)) + 2 * t;
      float x[2] = {factor * d[n][2 * q], factor * d[n][2 * q + 1]};
      if constexpr (kAdds) {
        const auto left = load_vector<T, 2>(to);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          x[e] = fmaf(p.addend, left[e], x[e]);
          if (kDiagonal) x[e] += n == eight && e == g % 2 ? p.identity : 0.0f;
        }
      }
      *reinterpret_cast<uint32_t*>(to) = pack2<T>(x[0], x[1]);
    }
  }
}

template <typename T>
__device__ inline void write_results(const HopperSums& d, const HopperTileOfWave& tile,
                                     unsigned char* results, int row) {
  const Product& p = tile.of->product;
  int column = tile.column;
#pragma unroll
  for (int i = 0; i < kRightBoxes; ++i, results += kBoxBytes, column += kBoxSide) {
    if (!stores_box(p, row, column)) break;
    const float (*sums)[4] = d + i * kBoxSide / 8;
    if (!p.adds_left()) {
      write_box<T, false, false>(sums, p, results, tile.factor, 0);
    } else if (row != column) {
      write_box<T, true, false>(sums, p, results, tile.factor, 0);
    } else {
      write_box<T, true, true>(sums, p, results, tile.factor, p.rows - row);
    }
  }
}

// Copies a warp's rows of a box.
__device__ inline void copy_rows_of_box(unsigned char* to, const unsigned char* from) {
  const int lane = int(threadIdx.x) % kWarpThreads;
  const int first = int(threadIdx.x) % kGroupThreads / kWarpThreads * int(kBoxBytes / kGroupWarps);
#pragma unroll
  for (int i = 0; i < int(kBoxBytes) / kGroupThreads / 16; ++i) {
    const int at = first + (i * kWarpThreads + lane) * 16;
    *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(from + at);
  }
}

// Multiplies every tile. meanwhile(tile, slots left, rows) is called beside the products of each
// slot, and finish(d, tile) with the sums.
template <typename T, typename Wave, typename Meanwhile, typename Finish>
__device__ inline void consume(const Wave& wave, const HopperPlaces& at, int c,
                               const Meanwhile& meanwhile, const Finish& finish) {
  HopperConsumer consumer = {at, c, {}};
  int square = first_square();
  if (square >= wave.squares) return;
  HopperSums d;
  HopperTileOfWave next(wave, square);
  while (square < wave.squares) {
    const HopperTileOfWave tile = next;
    const Product& p = tile.of->product;
    const int slots = p.k / kBoxSide;
    square += squares_at_once();
    const auto beside = [&](int left, uint32_t rows) {
      if (left == slots && square < wave.squares) next = HopperTileOfWave(wave, square);
      meanwhile(tile, left, rows);
    };
    if (std::is_same_v<Wave, HopperWave> && p.right_transposed) {
      consumer.multiply_all<T, true>(d, tile.shares_rows, slots, beside);
    } else {
      consumer.multiply_all<T, false>(d, tile.shares_rows, slots, beside);
    }
    finish(d, tile);
  }
}

// ---- the kernels --------------------------------------------------------------------------------

__device__ inline void initialise_barriers(const HopperPlaces& at) {
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kHopperSlots; ++slot) {
      mbarrier_init(at.full(slot), 1);
      mbarrier_init(at.empty(slot), kHopperCluster * kHopperConsumers * kGroupWarps);
    }
    for (int c = 0; c < kHopperConsumers; ++c) {
      mbarrier_init(at.written(c), kGroupWarps);
      mbarrier_init(at.stored(c), 1);
    }
    mbarrier_init_fence();
  }
  cluster_sync();
}

// What both kernels do: beside(tile) is called by the copying warp, store(c) by the storing warp of
// consumer c, multiply(c) by the consumer.
template <typename Wave, typename Beside, typename Store, typename Multiply>
__device__ inline void run_block(const Wave& wave, const HopperPlaces& at, const Beside& beside,
                                 const Store& store, const Multiply& multiply) {
  initialise_barriers(at);
  const int warp = warp_of_block();
  if (warp < kGroupWarps) {
    registers_down_to<56>();
    if (warp == 0) {
      if (elect_one()) copy_operands(wave, at, beside);
      __syncwarp();
    } else if (warp <= kHopperConsumers) {
      store(warp - 1);
    }
  } else {
    registers_up_to<224>();
    multiply(warp / kGroupWarps - 1);
  }
  // A block must not end while the other one copies to it or arrives at its barriers.
  cluster_sync();
}

template <typename T>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_product_kernel(const __grid_constant__ HopperWave wave) {
  unsigned char* const shared = swizzled_shared();
  const HopperPlaces at = {shared_address(shared)};
  const auto beside = [](const HopperTileOfWave&) { return [] {}; };
  const auto store = [&](int c) { store_results<T>(wave, at, shared, c); };
  run_block(wave, at, beside, store, [&](int c) {
    uint32_t parity = 1;
    // Saves the boxes that will be added, before their slots are filled again.
    const auto save = [&](const HopperTileOfWave& tile, int left, uint32_t rows) {
      if (left > tile.addends) return;
      if (left == tile.addends) mbarrier_wait(at.stored(c), parity);
      copy_rows_of_box(shared + at.result(c, tile.addends - left), shared + (rows - at.base));
      __syncwarp();
    };
    consume<T>(wave, at, c, save, [&](const HopperSums& d, const HopperTileOfWave& tile) {
      mbarrier_wait(at.stored(c), parity);
      write_results<T>(d, tile, shared + at.result(c, 0), tile.row + c * kBoxSide);
      __syncwarp();
      if (threadIdx.x % kWarpThreads == 0) mbarrier_arrive(at.written(c));
      parity ^= 1;
    });
  });
}

}  // namespace pmf::cuda::ns
