// The matrix product within a tile: C[rows, kN] = init + sum_p A_p[rows, depth] B_p[depth, kN].
//
// One step of the inner loop broadcasts kM elements of A, loads kN vectors of B and performs kM kN
// fused multiply-adds into accumulators that stay in registers. With AVX-512 (32 registers; two
// FMAs and two loads per cycle on the widest cores) 8 x 3 needs 11 loads for 24 FMAs: 5.5 cycles of
// loads against 12 of arithmetic, and 24 independent chains, two started per cycle, hide an FMA
// latency of 12. With AVX2 (16 registers) 4 x 3 fills them exactly.
//
// A is read one element at a time, so it may have any row and depth stride. B is packed: the kN
// vectors of a depth step are contiguous, and steps are `b_stride` units apart.
//
// A "unit" is what one lane multiplies in one step: a float, a double, or a pair of bf16 that are
// neighbours along depth (bf16x2; depth then counts pairs). Accumulation is in Accumulator<Unit>.
//
// Level amx_bf16 has units bf16x2 only, and multiplies 16 rows by 16 pairs at a time (amx-inl.h).
// Both operands already have the layout of its tiles if A's pairs are contiguous; A and B must be
// padded to kRowStep rows and kDepthStep units. With 3 tiles of C in a row, a step takes 4 loads,
// 32 cycles, for 3 multiplications, 48 cycles: the multiplications are the bound, and a vector of a
// product costs 1 cycle per 16 units of depth, and 1 to be stored.
#pragma once

#include "cpu/common/amx-inl.h"

namespace pmf::cpu::PMF_LEVEL {

// Register tile: kTileM rows by up to kTileN vectors.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileM = 8, kTileN = 3;
#elif defined(__AVX2__)
constexpr int kTileM = 4, kTileN = 3;
#else
constexpr int kTileM = 4, kTileN = 2;  // SSE2 has no FMA: a product needs its own register
#endif

// Products read rows of A, and units along depth, rounded up to multiples of these.
#if defined(__AMX_BF16__)
constexpr int64_t kRowStep = kAmxRows, kDepthStep = kAmxPairs;
#else
constexpr int64_t kRowStep = kTileM, kDepthStep = 1;
#endif

template <typename Unit>
struct UnitTraits {
  using Accumulator = Unit;
  using Lane = Unit;
  static constexpr int kDepth = 1;  // scalar products per unit
  static PMF_INLINE Vec<Unit> broadcast(const Unit* p) { return splat(*p); }
  static PMF_INLINE Vec<Unit> load_b(const Unit* p) { return load(p); }
  static PMF_INLINE Vec<Unit> multiply_add(Vec<Unit> a, Vec<Unit> b, Vec<Unit> c) {
    return fma(a, b, c);
  }
};

#if defined(__AVX512BF16__)
template <>
struct UnitTraits<bf16x2> {
  using Accumulator = float;
  using Lane = uint32_t;
  static constexpr int kDepth = 2;
  static PMF_INLINE Vec<uint32_t> broadcast(const bf16x2* p) { return splat(p->bits); }
  static PMF_INLINE Vec<uint32_t> load_b(const bf16x2* p) {
    return load(reinterpret_cast<const uint32_t*>(p));
  }
  static PMF_INLINE Vec<float> multiply_add(Vec<uint32_t> a, Vec<uint32_t> b, Vec<float> c) {
    return dot2(c, a, b);
  }
};
#endif

template <typename Unit>
using Accumulator = typename UnitTraits<Unit>::Accumulator;

// One term A B of a sum of products; element (i, k) of A is a[i * row_stride + k * depth_stride].
template <typename Unit>
struct TileProduct {
  const Unit* a;
  int64_t row_stride, depth_stride;
  const Unit* b;
  int64_t b_stride;
  int64_t depth;
};

#if defined(__AMX_BF16__)
// 16 rows of C, kN vectors wide and c_stride apart: C = sum of the products, or C += it if kAdd.
template <bool kAdd, int kProducts, int... J>
PMF_INLINE void multiply_tiles(float* c, int64_t c_stride, int64_t row,
                               const TileProduct<bf16x2> (&products)[kProducts], Lanes<J...>) {
  constexpr int kA = 6, kB = 7;
  constexpr int64_t kUnit = sizeof(bf16x2);
  static_assert(sizeof...(J) <= kA, "a tile register for every vector");
  sync_memory();
  if constexpr (kAdd) {
    (load_tile<J>(c + J * kAmxColumns, c_stride * kUnit), ...);
  } else {
    (zero_tile<J>(), ...);
  }
  PMF_UNROLL for (int p = 0; p < kProducts; ++p) {
    const TileProduct<bf16x2>& product = products[p];
    const bf16x2* a = product.a + row * product.row_stride;
    const bf16x2* b = product.b;
    for (int64_t k = 0; k < product.depth; k += kAmxPairs) {
      load_tile<kA>(a + k, product.row_stride * kUnit);
      ((load_tile<kB>(b + J * kAmxColumns, product.b_stride * kUnit), multiply_tile<J, kA, kB>()),
       ...);
      b += kAmxPairs * product.b_stride;
    }
  }
  (store_tile<J>(c + J * kAmxColumns, c_stride * kUnit), ...);
}
template <int kN, bool kAdd, int kProducts>
PMF_INLINE void multiply_tiles(float* c, int64_t c_stride, int64_t row,
                               const TileProduct<bf16x2> (&products)[kProducts]) {
  multiply_tiles<kAdd>(c, c_stride, row, products, typename CountLanes<kN>::type{});
}
#endif

template <int kM, int kN, typename Unit>
PMF_INLINE void accumulate(Vec<Accumulator<Unit>> (&c)[kM][kN], const TileProduct<Unit>& p,
                           int64_t row) {
  using Traits = UnitTraits<Unit>;
  using LaneVec = Vec<typename Traits::Lane>;
  const Unit* a = p.a + row * p.row_stride;
  const Unit* b = p.b;
  for (int64_t k = 0; k < p.depth; ++k) {
    LaneVec bv[kN];
    PMF_UNROLL for (int j = 0; j < kN; ++j) bv[j] =
        Traits::load_b(b + j * (kVecBytes / sizeof(Unit)));
    PMF_UNROLL for (int i = 0; i < kM; ++i) {
      const LaneVec av = Traits::broadcast(a + i * p.row_stride);
      PMF_UNROLL for (int j = 0; j < kN; ++j) c[i][j] = Traits::multiply_add(av, bv[j], c[i][j]);
    }
    a += p.depth_stride;
    b += p.b_stride;
  }
}

// Processes rows in steps of kM; `rows` is rounded up, so A needs kM - 1 readable rows past the
// last (kRowStep - 1 with AMX), and init and finish are called for them too.
//   init(c, row):   c[i][j] = starting value of row + i, vector j
//   finish(c, row): store them
template <int kM, int kN, int kProducts, typename Unit, typename Init, typename Finish>
PMF_INLINE void tile_gemm(int64_t rows, const TileProduct<Unit> (&products)[kProducts], Init init,
                          Finish finish) {
#if defined(__AMX_BF16__)
  static_assert(kAmxRows % kM == 0, "");
  alignas(kVecBytes) float product[kAmxRows * kN * kAmxColumns];
#endif
  for (int64_t row = 0; row < rows; row += kM) {
    Vec<Accumulator<Unit>> c[kM][kN];
    init(c, row);
#if defined(__AMX_BF16__)
    const int64_t inside = row % kAmxRows;
    if (inside == 0) multiply_tiles<kN, false>(product, kN * kAmxColumns, row, products);
    PMF_UNROLL for (int i = 0; i < kM; ++i) {
      PMF_UNROLL for (int j = 0; j < kN; ++j) {
        c[i][j] += load(product + ((inside + i) * kN + j) * kAmxColumns);
      }
    }
#else
    PMF_UNROLL for (int p = 0; p < kProducts; ++p) accumulate(c, products[p], row);
#endif
    finish(c, row);
  }
}

// out[rows][kN vectors] = the sum of the products. Rounds rows up to kRowStep.
template <int kN, int kProducts, typename Unit>
inline void store_product(Accumulator<Unit>* out, int64_t rows,
                          const TileProduct<Unit> (&products)[kProducts]) {
  using Float = Accumulator<Unit>;
  constexpr int kStep = kLanes<Float>;
#if defined(__AMX_BF16__)
  for (int64_t row = 0; row < rows; row += kAmxRows) {
    multiply_tiles<kN, false>(out + row * (kN * kStep), kN * kStep, row, products);
  }
#else
  tile_gemm<kTileM, kN>(
      rows, products,
      [](auto& c, int64_t) {
        PMF_UNROLL for (int i = 0; i < kTileM; ++i) {
          PMF_UNROLL for (int j = 0; j < kN; ++j) c[i][j] = Vec<Float>{};
        }
      },
      [out](auto& c, int64_t row) {
        PMF_UNROLL for (int i = 0; i < kTileM; ++i) {
          PMF_UNROLL for (int j = 0; j < kN; ++j) {
            store(out + ((row + i) * kN + j) * kStep, c[i][j]);
          }
        }
      });
#endif
}

}  // namespace pmf::cpu::PMF_LEVEL
