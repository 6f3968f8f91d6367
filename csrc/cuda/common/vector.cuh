// Vectors of a row in registers: 16-byte global loads and stores, fp32 arithmetic.
#pragma once

#include "cuda/common/cuda.cuh"

namespace pmf::cuda {

constexpr int kVectorBytes = 16;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

// kWidth elements that are loaded and stored as one word.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T element[kWidth];
  __device__ float operator[](int k) const { return to_float(element[k]); }
};

// The type of a word moved by one memory instruction. Plain assignments get split, so stores use
// __stwb, the default store (st.global.wb), as one instruction.
template <int kBytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<2> {
  using type = unsigned short;
};

// The address must be aligned to the vector's size.
template <typename T, int kWidth>
__device__ inline Vector<T, kWidth> load_vector(const T* address) {
  using W = typename Word<sizeof(T) * kWidth>::type;
  Vector<T, kWidth> result;
  *reinterpret_cast<W*>(&result) = *assume_aligned<sizeof(W)>(reinterpret_cast<const W*>(address));
  return result;
}

template <typename T, int kWidth>
__device__ inline void store_vector(T* address, const Vector<T, kWidth>& vector) {
  using W = typename Word<sizeof(T) * kWidth>::type;
  __stwb(assume_aligned<sizeof(W)>(reinterpret_cast<W*>(address)),
         *reinterpret_cast<const W*>(&vector));
}

// Rounds to nearest even, then stores.
template <typename T, int kWidth>
__device__ inline void store_vector(T* address, const float (&values)[kWidth]) {
  Vector<T, kWidth> result;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) result.element[k] = from_float<T>(values[k]);
  store_vector(address, result);
}

}  // namespace pmf::cuda
