// Rows of strided tensors on the GPU; shared by the elementwise kernels.
//
// A slot is what a thread reads and writes at once: a few neighbouring elements of a row. Its
// access policy is either Whole, one 16-byte word, or Pairs, two elements of any alignment, for
// views with unaligned rows and widths that are not a multiple of a word.
#pragma once

#include <initializer_list>

#include "cuda/common/cuda.cuh"
#include "cuda/common/device.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/vector.cuh"
#include "pmf/rows.h"

namespace pmf::cuda {

// ---- slots -------------------------------------------------------------------------------------

// Elements at or past `width` read as zero and are not stored.
template <typename T>
struct Whole {
  using Element = T;
  static constexpr int kWidth = kVectorBytes / sizeof(T);
  using Slot = Vector<T, kWidth>;

  static __device__ Slot load(const T* row, int64_t column, int64_t width) {
    return column < width ? load_vector<T, kWidth>(row + column) : Slot{};
  }
  static __device__ void store(T* row, int64_t column, int64_t width, const float (&v)[kWidth]) {
    if (column < width) store_vector<T, kWidth>(row + column, v);
  }
};

template <typename T>
struct Pairs {
  using Element = T;
  static constexpr int kWidth = 2;
  using Slot = Vector<T, kWidth>;

  static __device__ Slot load(const T* row, int64_t column, int64_t width) {
    const T zero = from_float<T>(0.0f);
    return {{column < width ? row[column] : zero, column + 1 < width ? row[column + 1] : zero}};
  }
  static __device__ void store(T* row, int64_t column, int64_t width, const float (&v)[kWidth]) {
    if (column < width) row[column] = from_float<T>(v[0]);
    if (column + 1 < width) row[column + 1] = from_float<T>(v[1]);
  }
};

// ---- rows --------------------------------------------------------------------------------------

// a / b for a, b >= 0. A 64-bit division takes five times as long as a 32-bit one.
__device__ inline int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// A row's index in each leading dimension. With a single dimension, the usual case, no division is
// needed.
struct RowIndex {
  int64_t at[kMaxLeading];
  int leading;

  __device__ RowIndex(const RowShape& shape, int64_t row) : leading(shape.leading) {
#pragma unroll
    for (int d = kMaxLeading - 1; d >= 0; --d) {
      at[d] = 0;
      if (d < leading) {
        const int64_t rest = d == 0 ? 0 : divide(row, shape.size[d]);
        at[d] = row - rest * shape.size[d];
        row = rest;
      }
    }
  }
  __device__ int64_t offset(const int64_t* stride) const {
    int64_t sum = at[0] * stride[0];
    if (leading > 1) {  // `at` is zero from `leading` on
#pragma unroll
      for (int d = 1; d < kMaxLeading; ++d) sum += at[d] * stride[d];
    }
    return sum;
  }
  template <typename T>
  __device__ const T* in(const ConstRows& rows) const {
    return static_cast<const T*>(rows.data) + offset(rows.stride);
  }
  template <typename T>
  __device__ T* in(const Rows& rows) const {
    return static_cast<T*>(rows.data) + offset(rows.stride);
  }
};

// One slot of a row, for every operand.
template <class Access>
struct SlotIo {
  static constexpr int kWidth = Access::kWidth;
  using Element = typename Access::Element;

  RowIndex row;
  int64_t column, width;

  template <class Operand>
  __device__ typename Access::Slot load(const Operand& operand) const {
    return Access::load(row.template in<Element>(operand), column, width);
  }
  __device__ void store(const Rows& operand, const float (&v)[kWidth]) const {
    Access::store(row.template in<Element>(operand), column, width, v);
  }
};

// ---- choosing the policy and the element type (host) -------------------------------------------

struct RowOperand {
  const void* data;
  const int64_t* stride;

  RowOperand(const ConstRows& rows) : data(rows.data), stride(rows.stride) {}
  RowOperand(const Rows& rows) : data(rows.data), stride(rows.stride) {}
};
using RowOperands = std::initializer_list<RowOperand>;  // absent operands have null data

// Whether every row of every operand starts at a multiple of `width` elements, which are 16 bytes.
inline bool rows_aligned(const RowShape& shape, int64_t width, RowOperands operands) {
  bool aligned = shape.width % width == 0;
  for (const RowOperand& operand : operands) {
    aligned = aligned && reinterpret_cast<uintptr_t>(operand.data) % kVectorBytes == 0;
    for (int d = 0; d < shape.leading; ++d) aligned = aligned && operand.stride[d] % width == 0;
  }
  return aligned;
}

template <typename T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}), which returns a cudaError_t, with the T that `dtype` names.
template <class Body>
const char* with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return error_sentence(body(Type<float>{}));
    case DType::bf16:
      return error_sentence(body(Type<__nv_bfloat16>{}));
    case DType::f16:
      return error_sentence(body(Type<__half>{}));
    case DType::f64:
      break;
  }
  return "float64 has no CUDA kernel: use the plain PyTorch version in pmf.reference";
}

// ---- independent slots -------------------------------------------------------------------------

constexpr int kSlotThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;
constexpr int64_t kMaxBlocksDown = 65535;  // limit of a grid in y

// Grid-stride loop over slots numbered row by row, so that a warp reads whole cache lines whatever
// the row width. Work provides run(SlotIo).
template <class Access, class Work>
__global__ void __launch_bounds__(kSlotThreads)
    slots_kernel(const __grid_constant__ Work work, const __grid_constant__ RowShape shape,
                 int64_t slots) {
  const int64_t in_row = (shape.width + Access::kWidth - 1) / Access::kWidth;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kSlotThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kSlotThreads) + threadIdx.x; i < slots;
       i += step) {
    const int64_t row = divide(i, in_row), column = (i - row * in_row) * Access::kWidth;
    work.run(SlotIo<Access>{RowIndex(shape, row), column, shape.width});
  }
}

template <class Access, class Work>
cudaError_t launch_slots(const Work& work, const RowShape& shape, cudaStream_t stream) {
  const int64_t slots = shape.rows() * ((shape.width + Access::kWidth - 1) / Access::kWidth);
  const int64_t blocks = (slots + kSlotThreads - 1) / kSlotThreads;
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  return launch(slots_kernel<Access, Work>, grid, dim3(kSlotThreads), 0, stream, work, shape,
                slots);
}

// If the rows of all operands are contiguous, they form one row, so `width` need not fit a word.
template <typename T, class Work>
cudaError_t for_slots(const Work& work, RowShape shape, RowOperands operands, cudaStream_t stream) {
  bool flat = shape.leading == 1;
  for (const RowOperand& operand : operands) {
    flat = flat && (operand.data == nullptr || operand.stride[0] == shape.width);
  }
  if (flat) {
    shape.width *= shape.size[0];
    shape.leading = 0;
  }
  return rows_aligned(shape, Whole<T>::kWidth, operands)
             ? launch_slots<Whole<T>>(work, shape, stream)
             : launch_slots<Pairs<T>>(work, shape, stream);
}

}  // namespace pmf::cuda
