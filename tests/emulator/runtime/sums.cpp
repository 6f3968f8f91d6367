#include "sums.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace pmf::emulator {
namespace {

constexpr int kLanesOfDouble = 4, kLeastFloat = -126;

// 2^exponent in each of four columns.
__m256d power_of_two(__m128i exponent) {
  const __m256i biased =
      _mm256_add_epi64(_mm256_cvtepi32_epi64(exponent), _mm256_set1_epi64x(1023));
  return _mm256_castsi256_pd(_mm256_slli_epi64(biased, 52));
}

// Rounds toward zero: to nearest, then one unit down if that is larger in magnitude. Infinities and
// NaNs stay what they are.
__m128 cut_to_float(__m256d x) {
  const __m256d sign = _mm256_set1_pd(-0.0);
  const __m128 nearest = _mm256_cvtpd_ps(x);
  const __m256d back = _mm256_cvtps_pd(nearest), size = _mm256_andnot_pd(sign, x);
  const __m256d beyond = _mm256_and_pd(
      _mm256_cmp_pd(_mm256_andnot_pd(sign, back), size, _CMP_GT_OQ),
      _mm256_cmp_pd(size, _mm256_set1_pd(0x1p128), _CMP_LT_OQ));  // overflows stay infinite
  const __m256i less =
      _mm256_castpd_si256(beyond);  // -1 if true; the lower half of each 64 bits is used
  const __m128i units = _mm256_castsi256_si128(
      _mm256_permutevar8x32_epi32(less, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6)));
  return _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(nearest), units));
}

// exponent_of() in every column.
__m256i exponents_of(const float (&c)[kColumns]) {
  const __m256 x = _mm256_loadu_ps(c);
  const __m256i biased =
      _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(x), 23), _mm256_set1_epi32(0xff));
  const __m256i exponent = _mm256_max_epi32(_mm256_sub_epi32(biased, _mm256_set1_epi32(127)),
                                            _mm256_set1_epi32(kLeastFloat));
  const __m256 zero = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ);
  return _mm256_blendv_epi8(exponent, _mm256_set1_epi32(kNothing), _mm256_castps_si256(zero));
}

void add_block(float (&c)[kColumns], const Row& a, const Columns& b, int first, int last) {
  __m256i largest = exponents_of(c);
  for (int k = first; k < last; ++k) {
    const auto* exponents = reinterpret_cast<const __m256i*>(b.exponent[k]);
    largest = _mm256_max_epi32(
        largest, _mm256_add_epi32(_mm256_load_si256(exponents), _mm256_set1_epi32(a.exponent[k])));
  }
  // If all terms are zero, any unit will do.
  largest = _mm256_max_epi32(largest, _mm256_set1_epi32(2 * kLeastFloat));
  alignas(32) int most[kColumns];
  _mm256_store_si256(reinterpret_cast<__m256i*>(most), largest);
  for (int j = 0; j < kColumns; j += kLanesOfDouble) {
    const __m128i exponent = _mm_load_si128(reinterpret_cast<const __m128i*>(most + j));
    const __m128i bits = _mm_set1_epi32(tensor_cores.fraction_bits);
    const __m256d to_units = power_of_two(_mm_sub_epi32(bits, exponent));
    const __m256d unit = power_of_two(_mm_sub_epi32(exponent, bits));
    const auto cut = [&](__m256d x) {
      return _mm256_round_pd(_mm256_mul_pd(x, to_units), _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    };
    __m256d sum = cut(_mm256_cvtps_pd(_mm_loadu_ps(c + j)));
    for (int k = first; k < last; ++k) {
      const __m256d product =
          _mm256_mul_pd(_mm256_set1_pd(a.value[k]), _mm256_loadu_pd(b.value[k] + j));
      sum = _mm256_add_pd(sum, cut(product));
    }
    _mm_storeu_ps(c + j, cut_to_float(_mm256_mul_pd(sum, unit)));
  }
}

// Adds in order, rounding each sum to nearest.
void add_in_order(float (&c)[kColumns], const Row& a, const Columns& b, int depth) {
  for (int j = 0; j < kColumns; ++j) {
    for (int k = 0; k < depth; ++k) {
      c[j] = std::fma(static_cast<float>(a.value[k]), static_cast<float>(b.value[k][j]), c[j]);
    }
  }
}

}  // namespace

int exponent_of(float x, int least) {
  const auto word = __builtin_bit_cast(uint32_t, x);
  if ((word & 0x7fffffffu) == 0) return kNothing;
  return std::max(static_cast<int>(word >> 23 & 0xff) - 127, least);
}

void add_products(float (&c)[kColumns], const Row& a, const Columns& b, int depth) {
  if (tensor_cores.fraction_bits == 0) return add_in_order(c, a, b, depth);
  const int step = depth / tensor_cores.blocks;
  for (int k = 0; k < depth; k += step) add_block(c, a, b, k, k + step);
}

}  // namespace pmf::emulator
