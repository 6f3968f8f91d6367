// The products of Newton-Schulz: one launch computes a wave (newton_schulz_plan.h), that is, every
// product of every matrix in it; each block computes a 128 x 128 tile (gemm_tile.cuh).
//
//   product_kernel   out = factor scale left right + addend left + identity I
//   update_kernel    the last wave: target = left right, or
//                    p <- (1 - lr wd) p - lr scale left right
//
// A symmetric product computes the tiles on and below the diagonal and stores each twice, as
// computed and mirrored, so that the result is exactly symmetric and `right` may be read as its own
// transpose. Both stores read the tile back from shared memory in the order that fills whole
// sectors.
//
// Bytes: operands come from L2 (an X of 768 x 2048 is 3 MB and its tiles run concurrently), each
// result is written once; the update reads and writes p. FLOPs: newton_schulz_plan.h, and a few
// more because diagonal tiles are computed in full: a step of pMF-B/16 takes 2.6 TFLOP in the
// direct form and 2.2 as planned. The tensor cores are the bound.
#pragma once

#include "cuda/common/gemm_tile.cuh"
#include "cuda/common/shared.cuh"
#include "cuda/newton_schulz/newton_schulz_plan.h"
#include "cuda/newton_schulz/newton_schulz_updates.cuh"

namespace pmf::cuda::ns {

// A kernel parameter, so it lies in the constant bank.
struct WaveTable {
  Product products[kMaxProducts];
  int count;
};

// The tile that a block computes.
struct Tile {
  const Product* product;
  int matrix;  // within the product
  int row, column;

  __device__ explicit Tile(const WaveTable& wave) {
    int index = wave.count - 1;
    while (static_cast<int>(blockIdx.x) < wave.products[index].first_tile) --index;
    product = &wave.products[index];
    const int down = (product->m + kTile - 1) / kTile, across = (product->n + kTile - 1) / kTile;
    const int each = product->symmetric ? down * (down + 1) / 2 : down * across;
    int tile = static_cast<int>(blockIdx.x) - product->first_tile;
    matrix = tile / each;
    tile -= matrix * each;
    if (product->symmetric) {  // row r of the triangle starts at r (r + 1) / 2
      int r = static_cast<int>((sqrtf(8.0f * static_cast<float>(tile) + 1) - 1) / 2);
      while (r * (r + 1) / 2 > tile) --r;
      while ((r + 1) * (r + 2) / 2 <= tile) ++r;
      row = r * kTile;
      column = (tile - r * (r + 1) / 2) * kTile;
    } else {
      row = tile / across * kTile;
      column = tile % across * kTile;
    }
  }
};

template <class Products, bool kTransposed>
__device__ inline void multiply(float (&c)[Products::kParts][8][4], const Tile& tile) {
  using Element = typename Products::Element;
  const Product& p = *tile.product;
  const auto* left = static_cast<const Element*>(p.left) +
                     static_cast<int64_t>(tile.matrix) * p.m * p.k +
                     static_cast<int64_t>(tile.row) * p.k;
  const auto* right = static_cast<const Element*>(p.right) +
                      static_cast<int64_t>(tile.matrix) * p.n * p.k +
                      static_cast<int64_t>(tile.column) * (kTransposed ? p.k : 1);
  multiply_tile<Products, kTransposed>(c, {left, p.k, p.m - tile.row},
                                       {right, kTransposed ? p.k : p.n, p.n - tile.column}, p.k,
                                       dynamic_shared());
}

// ---- results that stay in the workspace --------------------------------------------------------

// Stores the staged tile, or its transpose if kMirrored, in the product's result.
template <class Products, bool kMirrored>
__device__ inline void store_tile(const StagedTile& staged, const Tile& tile) {
  using Element = typename Products::Element;
  constexpr int kWidth = kVectorBytes / sizeof(Element), kAcross = kTile / kWidth;
  const Product& p = *tile.product;
  const int64_t matrix = static_cast<int64_t>(tile.matrix) * p.m * p.n;
  Element* const out = static_cast<Element*>(p.out) + matrix;
  const Element* const left =
      static_cast<const Element*>(p.left) + matrix;  // it is read only where n = k
  const float factor = p.factor_of(tile.matrix);
  const int top = kMirrored ? tile.column : tile.row, side = kMirrored ? tile.row : tile.column;
#pragma unroll 4
  for (int v = threadIdx.x; v < kTile * kAcross; v += blockDim.x) {
    // A warp stores vectors along a row or, if kMirrored, 16 rows by two vectors.
    int row = v / kAcross, column = v % kAcross * kWidth;
    if constexpr (kMirrored) {
      row = v % 16 + v / 32 % (kTile / 16) * 16;
      column = (v / 16 % 2 + v / (2 * kTile) * 2) * kWidth;
    }
    const int i = top + row, j = side + column;
    if (i >= p.m || j >= p.n) continue;
    const int64_t at = static_cast<int64_t>(i) * p.n + j;
    float values[kWidth];
#pragma unroll
    for (int q = 0; q < kWidth; ++q) {
      values[q] = factor * (kMirrored ? *staged.at(column + q, row) : *staged.at(row, column + q));
    }
    if (p.adds_left()) {
      const auto old = load_vector<Element, kWidth>(left + at);
#pragma unroll
      for (int q = 0; q < kWidth; ++q) {
        values[q] = fmaf(p.addend, old[q], values[q]);
        if (i == j + q && i < p.rows) values[q] += p.identity;
      }
    }
    Vector<Element, kWidth> rounded;
#pragma unroll
    for (int q = 0; q < kWidth; ++q) rounded.element[q] = Products::round(values[q]);
    store_vector(out + at, rounded);
  }
}

// Copies the lower half of a tile on the diagonal to its upper half.
__device__ inline void mirror_within(const StagedTile& staged) {
  const int column = threadIdx.x;
  for (int row = 0; column < kTile && row < column; ++row)
    *staged.at(row, column) = *staged.at(column, row);
  __syncthreads();
}

template <class Products>
__global__ void __launch_bounds__(kTileThreads<Products::kParts>, Products::kBlocks)
    product_kernel(const __grid_constant__ WaveTable wave) {
  const Tile tile(wave);
  float c[Products::kParts][8][4];
  if (tile.product->right_transposed) {
    multiply<Products, true>(c, tile);
  } else {
    multiply<Products, false>(c, tile);
  }
  const StagedTile staged(dynamic_shared());
  staged.store(c);
  if (!tile.product->symmetric) {
    store_tile<Products, false>(staged, tile);
  } else if (tile.row == tile.column) {
    mirror_within(staged);
    store_tile<Products, false>(staged, tile);
  } else {
    store_tile<Products, false>(staged, tile);
    store_tile<Products, true>(staged, tile);
  }
}

template <class Products>
__global__ void __launch_bounds__(kTileThreads<Products::kParts>, Products::kBlocks)
    update_kernel(const __grid_constant__ WaveTable wave,
                  const __grid_constant__ TargetTable table) {
  const Tile tile(wave);
  float c[Products::kParts][8][4];
  multiply<Products, false>(c, tile);
  constexpr int kParts = Products::kParts;
  static_assert(kTileThreads<kParts> / kWarpThreads * kParts * StagedSums::kBytes <=
                kTileSharedBytes);
  const Updates update(table, *tile.product, tile.matrix);
  const auto staged = [&](int part) {
    const int number = static_cast<int>(threadIdx.x) / kWarpThreads * kParts + part;
    return StagedSums(dynamic_shared() + number * StagedSums::kBytes);
  };
#pragma unroll
  for (int i = 0; i < kParts; ++i) staged(i).write(c[i]);
#pragma unroll 1
  for (int i = 0; i < kParts; ++i) {
    update(staged(i), tile.row + warp_row<kParts>() + 16 * i, tile.column + warp_column<kParts>());
  }
}

}  // namespace pmf::cuda::ns
