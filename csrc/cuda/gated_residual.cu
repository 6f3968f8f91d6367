// Gated residual on CUDA: y = x + g b, ty = tx + g tb + tg b. The contract is pmf/gated_residual.h.
//
// Tiling: each thread owns one 16-byte vector of a row (8 bf16 or fp16, 4 fp32), the widest load
// there is. The threads of a block lie side by side along the row, and over several rows where a
// row has fewer vectors than a block has threads, so that every warp reads whole lines; the gate,
// the same for neighbouring rows, comes from L1. Rows beyond the grid are looped over.
//
// Bytes, in units of one [rows, W] tensor: 3 (x, b, y), with tangents 6. There is one FMA for every
// 3 elements moved, so copy bandwidth is the bound: [256, 276, 768] in bf16 would take 0.11 ms at
// 3.0 TB/s, 0.22 ms with tangents (an estimate; not measured). Sums are in fp32; each result is
// rounded once, at the store.
//
// Rows that are not 16-byte aligned, or whose width is no multiple of a vector, take the same
// kernel with vectors of one element.
#include "cuda/common/vector.cuh"
#include "cuda/launch.h"

namespace pmf::cuda {
namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr int64_t kMaxBlocks = 1 << 16;  // enough to fill any device

// Element offset of row `row`. One leading dimension, the usual case, needs no division.
__device__ inline int64_t row_offset(const RowShape& shape, const int64_t* stride, int64_t row) {
  int64_t offset = 0;
#pragma unroll
  for (int d = kMaxLeading - 1; d >= 1; --d) {
    if (d < shape.leading) {
      const int64_t rest = row / shape.size[d];
      offset += (row - rest * shape.size[d]) * stride[d];
      row = rest;
    }
  }
  return offset + row * stride[0];
}

template <typename T, int kWidth>
__device__ inline Vector<T, kWidth> load(const ConstRows& rows, const RowShape& shape, int64_t row,
                                         int64_t column) {
  return load_vector<T, kWidth>(static_cast<const T*>(rows.data) +
                                row_offset(shape, rows.stride, row) + column);
}

template <typename T, int kWidth>
__device__ inline void store(const Rows& rows, const RowShape& shape, int64_t row, int64_t column,
                             const float (&values)[kWidth]) {
  store_vector<T, kWidth>(static_cast<T*>(rows.data) + row_offset(shape, rows.stride, row) + column,
                          values);
}

template <typename T, int kWidth, bool kTangent>
__device__ inline void gated_residual_vector(const GatedResidualParams& p, int64_t row,
                                             int64_t column) {
  const auto x = load<T, kWidth>(p.x, p.shape, row, column);
  const auto b = load<T, kWidth>(p.branch, p.shape, row, column);
  const auto g = load<T, kWidth>(p.gate, p.shape, row, column);
  float y[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) y[k] = fmaf(g[k], b[k], x[k]);
  store<T, kWidth>(p.y, p.shape, row, column, y);
  if constexpr (kTangent) {
    const auto tx = load<T, kWidth>(p.x_t, p.shape, row, column);
    const auto tb = load<T, kWidth>(p.branch_t, p.shape, row, column);
    const auto tg = load<T, kWidth>(p.gate_t, p.shape, row, column);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) y[k] = fmaf(tg[k], b[k], fmaf(g[k], tb[k], tx[k]));
    store<T, kWidth>(p.y_t, p.shape, row, column, y);
  }
}

// Threads x run along the row, threads y over rows.
template <typename T, int kWidth, bool kTangent>
__global__ void __launch_bounds__(kThreads)
    gated_residual_kernel(const __grid_constant__ GatedResidualParams p, int64_t rows) {
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y; row < rows;
       row += row_step) {
    for (int64_t column = threadIdx.x * kWidth; column < p.shape.width;
         column += blockDim.x * kWidth) {
      gated_residual_vector<T, kWidth, kTangent>(p, row, column);
    }
  }
}

bool aligned(const void* data, const int64_t* stride, int leading, int64_t width) {
  bool result = reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  for (int d = 0; d < leading; ++d) result = result && stride[d] % width == 0;
  return result;
}

template <typename T, int kWidth>
cudaError_t launch(const GatedResidualParams& p, cudaStream_t stream) {
  const int64_t rows = p.shape.rows(), vectors = p.shape.width / kWidth;
  int along = 1;  // threads along the row: its vectors, rounded up to keep warps whole
  while (along < vectors && along < kWarp) along *= 2;
  while (along < vectors && along < kThreads) along += kWarp;
  const dim3 threads(along, kThreads / along);
  const int64_t needed = (rows + threads.y - 1) / threads.y;
  const dim3 blocks(static_cast<unsigned>(needed < kMaxBlocks ? needed : kMaxBlocks));
  if (p.x_t.data == nullptr) {
    gated_residual_kernel<T, kWidth, false><<<blocks, threads, 0, stream>>>(p, rows);
  } else {
    gated_residual_kernel<T, kWidth, true><<<blocks, threads, 0, stream>>>(p, rows);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_widest(const GatedResidualParams& p, cudaStream_t stream) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const int n = p.shape.leading;
  bool wide = p.shape.width % kWidth == 0 && aligned(p.y.data, p.y.stride, n, kWidth);
  for (const ConstRows* rows : {&p.x, &p.branch, &p.gate, &p.x_t, &p.branch_t, &p.gate_t}) {
    wide = wide && aligned(rows->data, rows->stride, n, kWidth);
  }
  if (p.x_t.data != nullptr) wide = wide && aligned(p.y_t.data, p.y_t.stride, n, kWidth);
  return wide ? launch<T, kWidth>(p, stream) : launch<T, 1>(p, stream);
}

}  // namespace

const char* gated_residual(const GatedResidualParams& params, void* stream) {
  if (params.shape.rows() * params.shape.width == 0) return nullptr;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DType::f32:
      return error_sentence(launch_widest<float>(params, queue));
    case DType::bf16:
      return error_sentence(launch_widest<__nv_bfloat16>(params, queue));
    case DType::f16:
      return error_sentence(launch_widest<__half>(params, queue));
    case DType::f64:
      return "float64 runs on the CPU only";
  }
  return nullptr;
}

}  // namespace pmf::cuda
