// Both products of the patch embedding in one kernel, for 16-bit types and R <= 256: hidden stays
// in shared memory in between.
//
// Tiling: a block of 256 threads processes 128 patches. The first product is 128 x 256 (columns
// past R are zero), with eight warps, two by four, computing 64 x 64 each; slices of 32 features of
// the pixels and of W_down stream in, three in flight. hidden is rounded, stored for the backward,
// and laid out in shared memory as the left factor of the second product, which computes 256
// columns of the tokens at a time while W_up streams from L2.
//
// Shared memory: hidden 64 KB and three 16 KB slices of W_up, 112 KB in all; the slices of the
// first product, 72 KB, share this space. Devices with less run the two products in separate
// kernels.
#pragma once

#include "cuda/patch_embed/patch_gemm.cuh"

namespace pmf::cuda {

constexpr int kFusedThreads = 256;
constexpr int kFusedBlocks = 1;     // per SM
constexpr int kFusedColumns = 256;  // per tile; also the maximum of R
constexpr int kFusedStages = 3;
constexpr int kWeightBytes = kFusedColumns * kSliceBytes;  // a slice of W_down or W_up
constexpr int kHiddenBytes = kTile * kFusedColumns * 2;
constexpr int kFusedSharedBytes = kHiddenBytes + kFusedStages * kWeightBytes;
static_assert(kFusedStages * (kOperandBytes + kWeightBytes) <= kFusedSharedBytes, "they alias");

// Pairs are value and tangent. Weights are contiguous, with rows 16-byte aligned.
struct PatchFused {
  GridView patches[2], hidden[2], tokens[2];
  GridView weight_down, weight_up;
  GridView bias_down, bias_up, position;  // added to the value only; null: none
  int64_t tiles[2];                       // of 128 patches
};

// Transposes a 4 x 4 matrix of which each lane of a quad holds a row.
__device__ inline void transpose_quad(uint32_t (&v)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = shuffle_xor(odd ? v[i] : v[i + 1], 1);
    v[i] = odd ? other : v[i];
    v[i + 1] = odd ? v[i + 1] : other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = shuffle_xor(high ? v[i] : v[i + 2], 2);
    v[i] = high ? other : v[i];
    v[i + 2] = high ? v[i + 2] : other;
  }
}

// Address of a chunk of hidden as the left factor: slices of 32 columns, 128 rows each, in the
// layout that load_a reads.
__device__ inline unsigned char* hidden_chunk(unsigned char* hidden, int row, int column) {
  return hidden + column / 32 * kOperandBytes + row_chunk(row, column % 32 / 8);
}

// This warp's products of one slice.
template <class T>
__device__ inline void multiply_slice(float (&c)[4][8][4], const unsigned char* left,
                                      const unsigned char* right) {
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    Fragments<4> f;
    load_a(f.a, left, half, warp_row());
    load_b_transposed(f.b, right, half, warp_column());
    HalfProducts<T>::multiply(c, f);
  }
}

// hidden = patches W_down' for this block, in registers.
template <class T>
__device__ inline void multiply_patches(float (&c)[4][8][4], const GridView& patches,
                                        const GridView& weight, int64_t first_row,
                                        unsigned char* shared) {
  const int slices = static_cast<int>((weight.column.count + kDepth<T> - 1) / kDepth<T>);
  const GridCopy<T, true, kFusedThreads, kTile> copy_left(patches, first_row, 0);
  const GridCopy<T, true, kFusedThreads, kFusedColumns> copy_right(weight, 0, 0);
  const auto stage_of = [&](int slice) {
    return shared + slice % kFusedStages * (kOperandBytes + kWeightBytes);
  };
  const auto copy = [&](int slice) {
    if (slice < slices) {
      copy_left(stage_of(slice), static_cast<int64_t>(slice) * kDepth<T>);
      copy_right(stage_of(slice) + kOperandBytes, static_cast<int64_t>(slice) * kDepth<T>);
    }
    cp_async_commit();
  };
  for (int slice = 0; slice < kFusedStages - 1; ++slice) copy(slice);
  for (int slice = 0; slice < slices; ++slice) {
    cp_async_wait<kFusedStages - 2>();
    __syncthreads();
    copy(slice + kFusedStages - 1);
    if (warp_column() < weight.row.count) {
      multiply_slice<T>(c, stage_of(slice), stage_of(slice) + kOperandBytes);
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // hidden overwrites the slices
}

// Rounds hidden + b_down to shared memory and stores it from there.
template <class T>
__device__ inline void store_hidden(const float (&c)[4][8][4], const GridView& out, const T* bias,
                                    int64_t first_row, unsigned char* hidden) {
  const int lane = threadIdx.x % kWarpThreads, count = static_cast<int>(out.column.count);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int column = warp_column() + 8 * j + lane % 4 * 2;
    const bool biased = bias != nullptr && column < count;
    const float b0 = biased ? to_float(bias[column]) : 0.0f;
    const float b1 = biased ? to_float(bias[column + 1]) : 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_row() + 16 * i + lane / 4 + 8 * h;
        *reinterpret_cast<uint32_t*>(hidden_chunk(hidden, row, column) + column % 8 * 2) =
            pack2<T>(c[i][j][2 * h] + b0, c[i][j][2 * h + 1] + b1);
      }
    }
  }
  __syncthreads();
  const int chunks = count / kChunk<T>;
  for (int i = threadIdx.x; i < kTile * chunks; i += kFusedThreads) {
    const int r = i / chunks, column = (i - r * chunks) * kChunk<T>;
    if (first_row + r >= out.row.count) break;
    const auto chunk =
        load_vector<T, kChunk<T>>(reinterpret_cast<const T*>(hidden_chunk(hidden, r, column)));
    store_vector(static_cast<T*>(out.data) + (first_row + r) * count + column, chunk);
  }
}

// Adds the bias and the position (null: none) to a tile of the tokens and stores it, 16 bytes per
// lane.
template <class T>
__device__ inline void store_tokens(const float (&c)[4][8][4], const GridView& out, const T* bias,
                                    const T* position, const Digits& position_row,
                                    int64_t first_row, int64_t first_column) {
  const int lane = threadIdx.x % kWarpThreads, quad = lane % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = first_row + warp_row() + 16 * i + lane / 4 + 8 * h;
      const bool exists = row < out.row.count;
      const int64_t offset = exists ? out.row.offset(row) : 0;
      const bool placed = position != nullptr && exists;
      const T* const added = placed ? position + position_row.offset(row) : nullptr;
#pragma unroll
      for (int group = 0; group < 8; group += 4) {
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t column = first_column + warp_column() + 8 * (group + j) + 2 * quad;
          float v0 = c[i][group + j][2 * h], v1 = c[i][group + j][2 * h + 1];
          if (column < out.column.count) {
            if (bias != nullptr) {
              const auto b = load_vector<T, 2>(bias + column);
              v0 += b[0], v1 += b[1];
            }
            if (added != nullptr) {
              const auto p = load_vector<T, 2>(added + column);
              v0 += p[0], v1 += p[1];
            }
          }
          pairs[j] = pack2<T>(v0, v1);
        }
        transpose_quad(pairs);
        const int64_t column = first_column + warp_column() + 8 * (group + quad);
        if (exists && column < out.column.count) {
          __stwb(assume_aligned<kChunkBytes>(
                     reinterpret_cast<uint4*>(static_cast<T*>(out.data) + offset + column)),
                 make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
        }
      }
    }
  }
}

// blockIdx.x selects 128 patches, first of the value, then of the tangent.
template <class T>
__global__ void __launch_bounds__(kFusedThreads, kFusedBlocks)
    patch_fused_kernel(const __grid_constant__ PatchFused p) {
  unsigned char* const shared = dynamic_shared();
  const int pair = blockIdx.x >= p.tiles[0] ? 1 : 0;
  const int64_t first_row = (blockIdx.x - (pair == 1 ? p.tiles[0] : 0)) * kTile;
  float c[4][8][4] = {};
  multiply_patches<T>(c, p.patches[pair], p.weight_down, first_row, shared);
  store_hidden<T>(c, p.hidden[pair], pair == 0 ? static_cast<const T*>(p.bias_down.data) : nullptr,
                  first_row, shared);

  // The slices of all column tiles form one pipeline.
  const GridView& out = p.tokens[pair];
  const T* const bias = pair == 0 ? static_cast<const T*>(p.bias_up.data) : nullptr;
  const T* const position = pair == 0 ? static_cast<const T*>(p.position.data) : nullptr;
  const int narrow = static_cast<int>(p.weight_up.column.count),
            width = static_cast<int>(out.column.count);
  const int slices = (narrow + kDepth<T> - 1) / kDepth<T>;
  const int tiles = (width + kFusedColumns - 1) / kFusedColumns;
  unsigned char* const weights = shared + kHiddenBytes;
  const auto stage_of = [&](int step) { return weights + step % kFusedStages * kWeightBytes; };
  const auto copy = [&](int step) {
    const int tile = step / slices, depth = (step - tile * slices) * kDepth<T>;
    if (tile < tiles) {
      const int chunk = threadIdx.x % 4, column = depth + chunk * kChunk<T>;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int row = threadIdx.x / 4 + q * (kFusedThreads / 4), at = tile * kFusedColumns + row;
        const bool valid = at < width && column < narrow;
        const T* from = static_cast<const T*>(p.weight_up.data);
        if (valid) from += static_cast<int64_t>(at) * narrow + column;
        cp_async_16(stage_of(step) + row_chunk(row, chunk), from, valid);
      }
    }
    cp_async_commit();
  };
  for (int step = 0; step < kFusedStages - 1; ++step) copy(step);
  for (int tile = 0, step = 0; tile < tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int q = 0; q < 4; ++q) c[i][j][q] = 0;
      }
    }
    for (int slice = 0; slice < slices; ++slice, ++step) {
      cp_async_wait<kFusedStages - 2>();
      __syncthreads();
      copy(step + kFusedStages - 1);
      if (tile * kFusedColumns + warp_column() < width) {
        multiply_slice<T>(c, shared + slice * kOperandBytes, stage_of(step));
      }
    }
    store_tokens<T>(c, out, bias, position, p.position.row, first_row,
                    static_cast<int64_t>(tile) * kFusedColumns);
  }
  cp_async_wait<0>();
}

}  // namespace pmf::cuda
