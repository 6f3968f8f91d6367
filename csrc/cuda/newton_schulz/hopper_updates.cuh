// The last wave of Newton-Schulz with Hopper instructions: what update_kernel computes
// (newton_schulz_products.cuh), with the tiles and warps of hopper_products.cuh.
//
// The consumers update the parameters from the accumulators. What a tile will update, the copying
// warp brings to the L2 cache beside the tile's operands, so that the consumers do not wait for
// memory.
#pragma once

#include "cuda/newton_schulz/hopper_products.cuh"
#include "cuda/newton_schulz/newton_schulz_updates.cuh"

namespace pmf::cuda::ns {

using HopperLastWave = HopperWaveOf<kMaxBuckets>;  // one product per bucket

// Prefetches what the last wave updates at a tile, a share beside each slot.
class TargetPrefetch {
 public:
  __device__ TargetPrefetch(const TargetTable& table, const HopperTileOfWave& tile) {
    const Product& p = tile.of->product;
    const Target& target = table.targets[p.first_matrix + tile.matrix];
    const int down = min(kHopperRows, p.rows - tile.row),
              across = min(kHopperSquare, p.columns - tile.column);
    if (table.coefficients == nullptr || down <= 0 || across <= 0) return;
    const auto of = [&](const void* data, int size) {  // the rows of a tall target are X's columns
      return target.tall ? Rows(data, size, p.rows, tile.column, tile.row, down)
                         : Rows(data, size, p.columns, tile.row, tile.column, across);
    };
    data_ = of(target.data, table.dtype == DType::f32 ? 4 : 2);
    if (target.master != nullptr) master_ = of(target.master, 4);
    left_ = target.tall ? across : down;
    const int slots = p.k / kBoxSide;
    each_ = (left_ + slots - 1) / slots;
  }

  __device__ void operator()() {
#pragma unroll 1
    for (int i = min(each_, left_); i > 0; --i, --left_) {
      data_.prefetch_next();
      if (master_.bytes != 0) master_.prefetch_next();
    }
  }

 private:
  // Parts of successive rows.
  struct Rows {
    uintptr_t address;
    int64_t pitch;
    uint32_t bytes;

    Rows() = default;
    __device__ Rows(const void* data, int size, int columns, int row, int column, int count)
        : address(reinterpret_cast<uintptr_t>(data) +
                  uintptr_t(size * (int64_t(row) * columns + column))),
          pitch(int64_t(size) * columns),
          bytes(uint32_t(size * count)) {}

    // Pieces of 16 bytes that hold a part of the row lie on its pages.
    __device__ void prefetch_next() {
      constexpr uintptr_t kPiece = 16;
      const uintptr_t from = address / kPiece * kPiece,
                      end = (address + bytes + kPiece - 1) / kPiece * kPiece;
      prefetch_to_l2(from, uint32_t(end - from));
      address += uintptr_t(pitch);
    }
  };

  Rows data_{}, master_{};
  int left_ = 0, each_ = 0;
};

// Updates the targets with a consumer's sums.
__device__ inline void update_targets(const HopperSums& d, const HopperTileOfWave& tile,
                                      const TargetTable& table, unsigned char* shared, int c) {
  static_assert(kBoxSide / 8 == StagedSums::kBlocks);
  const Updates update(table, tile.of->product, tile.matrix);
  const int warp = warp_of_block() % kGroupWarps;
  const StagedSums sums(shared + HopperPlaces::result(c, 0) + warp * StagedSums::kBytes);
#pragma unroll 1
  for (int box = 0; box < kRightBoxes; ++box) {
#pragma unroll
    for (int i = 0; i < kRightBoxes; ++i) {
      if (i == box) sums.write(d + i * StagedSums::kBlocks);
    }
    update(sums, tile.row + c * kBoxSide + 16 * warp, tile.column + box * kBoxSide);
  }
}

// The last wave: target = left right, or p <- (1 - lr wd) p - lr scale left right.
template <typename T>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_update_kernel(const __grid_constant__ HopperLastWave wave,
                         const __grid_constant__ TargetTable table) {
  unsigned char* const shared = swizzled_shared();
  const HopperPlaces at = {shared_address(shared)};
  const auto prefetch = [&](const HopperTileOfWave& tile) { return TargetPrefetch(table, tile); };
  const auto store_nothing = [](int) {};
  run_block(wave, at, prefetch, store_nothing, [&](int c) {
    const auto nothing = [](const HopperTileOfWave&, int, uint32_t) {};
    consume<T>(wave, at, c, nothing, [&](const HopperSums& d, const HopperTileOfWave& tile) {
      update_targets(d, tile, table, shared, c);
    });
  });
}

}  // namespace pmf::cuda::ns
