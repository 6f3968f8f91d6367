// Compile-time sizes of a forward kernel, and the queries of one unit.
#pragma once

#include "cuda/attention/attention_forward_plan.h"
#include "cuda/attention/attention_tile.cuh"

namespace pmf::cuda {

// The sizes listed in ForwardKernel and those that only the compiler needs. kRegular: see there.
template <typename Arithmetic, int kWidth_, int kOut_, int kKeys_, int kBlocks_, bool kTangent_,
          int kWarps_, bool kRegular_>
struct ForwardSizes {
  using E = Arithmetic;
  using T = typename E::Storage;
  static constexpr int kWidth = kWidth_, kOut = kOut_, kKeys = kKeys_;
  static constexpr int kBlocks = kBlocks_;  // 16-query blocks per unit
  static constexpr int kUnit = 16 * kBlocks;
  static constexpr bool kTangent = kTangent_, kRegular = kRegular_;
  static constexpr int kSides = kTangent ? 2 : 1;
  static constexpr int kWarps = kWarps_;  // most warps per block; bounds the registers per thread
  static constexpr int kSteps = kWidth / E::kDepth;  // K steps of a score product
  static constexpr int kTiles = kKeys / 8, kOutTiles = kOut / 8;
  // Wide kernels skip columns past the tensors' actual widths.
  static constexpr bool kSkips = kWidth > 80 && !kRegular;
  using KeyTile = SharedTile<T, kWidth>;
  using ValueTile = SharedTile<T, kOut>;
  // A ring slot: keys, their tangents, values, their tangents.
  static constexpr int kKeyElements = kKeys * kWidth, kValueElements = kKeys * kOut;
  static constexpr int kSlotElements = kSides * (kKeyElements + kValueElements);
  // A warp's queries, then their tangents.
  static constexpr int kUnitElements = kUnit * kWidth;
};

// A unit's queries or their tangents, in the warp's own part of shared memory.
template <class C>
struct UnitQueries {
  typename C::KeyTile tile;
  const uint32_t& sign;  // ForwardPlan::sign

  template <class Head>
  __device__ void load(const Head& head, int first, int rows, int width, int lane) const {
    if constexpr (C::kRegular) {
      load_whole_rows<1, 1>(tile, C::kUnit, &head, first, rows, lane, kWarpThreads);
    } else {
      load_rows(tile, C::kUnit, head, first, rows, width, lane, kWarpThreads);
    }
  }
  __device__ FragmentA fragment(int m, int step, int lane) const {
    FragmentA a = load_a(tile, 16 * m, 2 * step, lane);
    if constexpr (!C::kRegular) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a.x[i] ^= sign;
    }
    return a;
  }
};

}  // namespace pmf::cuda
