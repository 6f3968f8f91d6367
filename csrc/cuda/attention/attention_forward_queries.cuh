// The sizes of a kernel of attention's forward, and the queries of one unit: in registers as
// fragments where rows are short, else in the warp's own part of shared memory.
#pragma once

#include "cuda/attention/attention_forward_plan.h"
#include "cuda/attention/attention_tile.cuh"

namespace pmf::cuda {

// A kernel's sizes: what ForwardKernel says, and what only the compiler needs.
template <typename Arithmetic, int kWidth_, int kOut_, int kKeys_, int kBlocks_, bool kTangent_,
          bool kKeepsQueries_, int kWarps_>
struct ForwardSizes {
  using E = Arithmetic;
  using T = typename E::Storage;
  static constexpr int kWidth = kWidth_, kOut = kOut_, kKeys = kKeys_;
  static constexpr int kBlocks = kBlocks_;  // of 16 queries in a unit
  static constexpr int kUnit = 16 * kBlocks;
  static constexpr bool kTangent = kTangent_, kKeepsQueries = kKeepsQueries_;
  static constexpr int kSides = kTangent ? 2 : 1;
  static constexpr int kWarps = kWarps_;  // most of a block: bounds the registers of a thread
  static constexpr int kSteps = kWidth / E::kDepth;  // of a score product
  static constexpr int kTiles = kKeys / 8, kOutTiles = kOut / 8;
  static constexpr bool kSkips = kWidth > 80;  // wide kernels leave out what lies past the widths
  using KeyTile = SharedTile<T, kWidth>;
  using ValueTile = SharedTile<T, kOut>;
  static constexpr int kKeyElements = kKeys * kWidth, kValueElements = kKeys * kOut;
  static constexpr int kSlotElements = kSides * (kKeyElements + kValueElements);
  static constexpr int kQueryElements = kKeepsQueries ? 0 : kUnit * kWidth;  // of a warp
};

// A fragments of 16 queries, straight from global memory: a quad of lanes reads 64 bytes of a row,
// 16 each, and transposes. `sign` flips the sign of every element if its bits are set.
template <typename T, int kSteps>
__device__ inline void load_queries(FragmentA (&a)[kSteps], const HeadView<T>& head, int first,
                                    int rows, int width, uint32_t sign, int lane) {
  constexpr int kChunk = kChunkBytes / int(sizeof(T));
  const int g = lane >> 2, t = lane & 3;
  const bool whole =
      head.column_stride == 1 && width % kChunk == 0 &&
      (reinterpret_cast<uintptr_t>(head.data) | uintptr_t(head.row_stride * int64_t(sizeof(T)))) %
              kChunkBytes ==
          0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool inside = head.data != nullptr && first + g + 8 * h < rows;
    const T* row = head.data + int64_t(first + g + 8 * h) * head.row_stride;
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      uint32_t w[4] = {};
      if (whole) {
        const int column = (2 * step + t) * kChunk;
        if (inside && column < width) {
          const uint4 chunk = *assume_aligned<16>(reinterpret_cast<const uint4*>(row + column));
          w[0] = chunk.x, w[1] = chunk.y, w[2] = chunk.z, w[3] = chunk.w;
        }
        transpose_quad(w, lane);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float pair[2];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int column = (2 * step + i) * kChunk + 2 * t + k;
            const bool valid = inside && column < width;
            pair[k] = valid ? to_float(row[column * head.column_stride]) : 0.0f;
          }
          w[i] = pack2<T>(pair[0], pair[1]);
        }
      }
      a[step].x[h] = w[0] ^ sign, a[step].x[h + 2] = w[1] ^ sign;
      if (step + 1 < kSteps) a[step + 1].x[h] = w[2] ^ sign, a[step + 1].x[h + 2] = w[3] ^ sign;
    }
  }
}

// A unit's queries, in registers or in the warp's shared tile.
template <class C, bool kKeeps = C::kKeepsQueries>
struct UnitQueries {
  FragmentA kept[C::kBlocks][C::kSteps];

  __device__ void load(typename C::T*, const HeadView<typename C::T>& head, int first, int rows,
                       int width, uint32_t sign, int lane) {
#pragma unroll
    for (int m = 0; m < C::kBlocks; ++m) {
      load_queries(kept[m], head, first + 16 * m, rows, width, sign, lane);
    }
  }
  __device__ FragmentA fragment(int m, int step, int) const { return kept[m][step]; }
};

template <class C>
struct UnitQueries<C, false> {
  typename C::KeyTile tile;
  uint32_t sign;

  __device__ void load(typename C::T* shared, const HeadView<typename C::T>& head, int first,
                       int rows, int width, uint32_t flip, int lane) {
    tile.data = shared, sign = flip;
    load_rows(tile, C::kUnit, head.data, head.row_stride, head.column_stride, first, rows, width,
              lane, kWarpThreads);
  }
  __device__ FragmentA fragment(int m, int step, int lane) const {
    FragmentA a = load_a(tile, 16 * m, 2 * step, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) a.x[i] ^= sign;
    return a;
  }
};

}  // namespace pmf::cuda
