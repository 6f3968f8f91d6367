// Tiles of attention's backward: matrix products of any width, and rounding to units.
//
// Score tiles are S^T[key][lane], queries on the lanes, kTileN vectors wide (attention_mask-inl.h).
// They feed two kinds of product, which form bf16x2 pairs in different directions:
//
//   grad_key^[key][D]    += dS^T Q     depth = queries: pairs of lanes, "rows" of the tile
//   grad_query[query][D] += dS K       depth = keys: pairs of rows, interleaved lane by lane
//
// For float and double a unit is one number and both read the same tile.
#pragma once

#include "cpu/attention/attention_mask-inl.h"

namespace pmf::cpu::PMF_LEVEL {

// One or two products that share an accumulator; a product with an absent factor is not added.
template <typename Unit>
struct ProductList {
  TileProduct<Unit> items[2];
  int count = 0;
  PMF_INLINE void add(const TileProduct<Unit>& product) { items[count++] = product; }
};

// out[rows][kTileN vectors] = the sum of the products. Rounds rows up to kRowStep.
template <typename Unit>
inline void store_products(Accumulator<Unit>* out, int64_t rows, const ProductList<Unit>& list) {
  if (list.count == 2) {
    store_product<kTileN>(out, rows, list.items);
  } else if (list.count == 1) {
    store_product<kTileN, 1, Unit>(out, rows, {list.items[0]});
  } else {
    std::memset(out, 0, static_cast<size_t>(round_up(rows, kRowStep) * kTileN * kVecBytes));
  }
}

// Register tiles for products as wide as the tensors: kN vectors, and as many rows as leave
// registers for kN vectors of B and one broadcast. A width of 64 floats is one tile of 4 vectors,
// 80 one of 5, 128 two of 4: no tile has a single vector left, which would need one load per
// multiplication.
#if defined(__AVX512F__)
constexpr int kWideN = 5;
constexpr int rows_for(int vectors) {
  return vectors == 1 ? 12 : vectors == 2 ? 10 : vectors <= 4 ? 6 : 5;
}
#else
constexpr int kWideN = kTileN;
constexpr int rows_for(int) { return 4; }
#endif
// Most rows of a register tile, and rows of padding in A and C. Keys per tile of dS: a multiple of
// every rows_for(), so that blocks do not overlap, and small enough that P and dS of one block and
// panel (46 KB in fp32) are still in the L1 cache when they are multiplied.
#if defined(__AMX_BF16__)
constexpr int kMaxTileRows = kAmxRows;
constexpr int64_t kKeyBlock = 64;
#else
constexpr int kMaxTileRows = 12;
constexpr int64_t kKeyBlock = 60;
#endif
// Keys per step of sweep 1, a multiple of kRowStep.
constexpr int64_t kScoreBlock = 96;

// The number of vectors of a row in the next tile, out of `remaining`.
constexpr int next_vectors(int64_t remaining) {
  if (remaining <= kWideN) return static_cast<int>(remaining);
  if (kWideN < 5) return kWideN;
  return remaining == 6 ? 3 : 4;
}

// c[rows][kN vectors] += the sum of the products.
template <int kN, int kProducts, typename Unit>
inline void add_product(Accumulator<Unit>* c, int64_t c_stride, int64_t rows,
                        const TileProduct<Unit> (&products)[kProducts]) {
#if defined(__AMX_BF16__)
  for (int64_t row = 0; row < rows; row += kAmxRows) {
    multiply_tiles<kN, true>(c + row * c_stride, c_stride, row, products);
  }
#else
  using Float = Accumulator<Unit>;
  constexpr int kStep = kLanes<Float>;
  constexpr int kM = rows_for(kN);
  tile_gemm<kM, kN>(
      rows, products,
      [=](Vec<Float>(&acc)[kM][kN], int64_t row) {
        PMF_UNROLL for (int i = 0; i < kM; ++i) {
          PMF_UNROLL for (int j = 0; j < kN; ++j) {
            acc[i][j] = load(c + (row + i) * c_stride + j * kStep);
          }
        }
      },
      [=](Vec<Float>(&acc)[kM][kN], int64_t row) {
        PMF_UNROLL for (int i = 0; i < kM; ++i) {
          PMF_UNROLL for (int j = 0; j < kN; ++j) {
            store(c + (row + i) * c_stride + j * kStep, acc[i][j]);
          }
        }
      });
#endif
}

template <int kN, typename Unit>
inline void add_list(Accumulator<Unit>* c, int64_t c_stride, int64_t rows,
                     const ProductList<Unit>& list) {
  if (list.count == 2) {
    add_product<kN>(c, c_stride, rows, list.items);
  } else {
    add_product<kN, 1, Unit>(c, c_stride, rows, {list.items[0]});
  }
}

// c[rows][width] += the sum of the products; c_stride is the width rounded up to whole vectors.
// Rounds rows up to a tile: c has kMaxTileRows rows of padding with arbitrary contents.
template <typename Unit>
inline void add_products(Accumulator<Unit>* c, int64_t c_stride, int64_t rows,
                         ProductList<Unit> list) {
  constexpr int kStep = kLanes<Accumulator<Unit>>;
  if (list.count == 0) return;
  for (int64_t left = c_stride / kStep; left > 0;) {
    const int vectors = next_vectors(left);
    if (vectors == 1) add_list<1>(c, c_stride, rows, list);
    if (vectors == 2) add_list<2>(c, c_stride, rows, list);
    if constexpr (kWideN >= 3) {
      if (vectors == 3) add_list<3>(c, c_stride, rows, list);
    }
    if constexpr (kWideN >= 5) {
      if (vectors == 4) add_list<4>(c, c_stride, rows, list);
      if (vectors == 5) add_list<5>(c, c_stride, rows, list);
    }
    for (int p = 0; p < list.count; ++p) list.items[p].b += vectors * kStep;
    c += vectors * kStep;
    left -= vectors;
  }
}

// Converts kDepth rows of full-precision numbers to units, in either direction.
template <typename Unit>
struct TileWriter {
  static constexpr bool kOneTile = true;  // rows and pairs are the same numbers in the same memory
  // sum + the numbers in a unit, each times the weight of its row.
  static PMF_INLINE Vec<Unit> weigh(const Unit* unit, const Unit* weights, Vec<Unit> sum) {
    return fma(load(unit), splat(weights[0]), sum);
  }
  static PMF_INLINE void rows(Unit* dst, int64_t, const Vec<Unit> (&x)[1]) { store(dst, x[0]); }
  // Returns the sum of the stored numbers along keys.
  static PMF_INLINE Vec<Unit> both(Unit* rows, int64_t, Unit*, const Vec<Unit> (&x)[1]) {
    store(rows, x[0]);
    return x[0];
  }
};

#if defined(__AVX512BF16__)
template <>
struct TileWriter<bf16x2> {
  static constexpr bool kOneTile = false;
  static PMF_INLINE Vec<float> weigh(const bf16x2* unit, const float* weights, Vec<float> sum) {
    const Vec<uint32_t> u = load(reinterpret_cast<const uint32_t*>(unit));
    sum = fma((Vec<float>)(u << 16), splat(weights[0]), sum);
    return fma((Vec<float>)(u & 0xffff0000u), splat(weights[1]), sum);
  }
  static PMF_INLINE void rows(bf16x2* dst, int64_t stride, const Vec<float> (&x)[2]) {
    store_rows_of(dst, stride, (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]));
  }
  static PMF_INLINE Vec<float> both(bf16x2* rows, int64_t stride, bf16x2* pairs,
                                    const Vec<float> (&x)[2]) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]);
    store_rows_of(rows, stride, halves);
    using Vec16 = VecType<uint16_t>::type;
    Vec16 order;
    PMF_UNROLL for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + (i % 2) * 16);
    const Vec<uint32_t> mixed = (Vec<uint32_t>)_mm512_permutexvar_epi16((__m512i)order, halves);
    store(reinterpret_cast<uint32_t*>(pairs), mixed);
    return (Vec<float>)(mixed << 16) + (Vec<float>)(mixed & 0xffff0000u);
  }

 private:
  // Row 0 is the lower half; rows are `stride` units apart.
  static PMF_INLINE void store_rows_of(bf16x2* dst, int64_t stride, __m512i halves) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm512_castsi512_si256(halves));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + stride),
                        _mm512_extracti64x4_epi64(halves, 1));
  }
};
#endif

}  // namespace pmf::cpu::PMF_LEVEL
