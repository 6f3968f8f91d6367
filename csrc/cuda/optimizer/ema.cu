// All moving averages of all weights in one launch (or more, with at most kMaxTensors tensors
// each): a <- a + w (p - a), computed as torch.lerp does.
//
// Tiling: a block processes kBlockElements of one tensor, which it finds by bisection; a thread
// takes four elements at a time, 16 bytes of each average, or one if memory is not aligned.
//
// Bytes per element: the parameter once (4 or 2), plus 8 for each average. Memory bandwidth is the
// bound: 131 M parameters in bf16 with three averages, 3.4 GB, would take 1.1 ms at 3.0 TB/s (an
// estimate; not measured).
#include "pmf/ema.h"

#include "cuda/common/launch.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/optimizer/optimizer_launchers.h"

namespace pmf::cuda {
namespace {

constexpr int kThreads = 256, kVectors = 4;  // vectors per thread
constexpr int kWidth = 4;                    // elements per vector
constexpr int kBlockElements = kThreads * kVectors * kWidth;
constexpr int kMaxTensors = 448;

struct Entry {
  EmaTensor tensor;
  int first_block;
  bool aligned;
};

// A kernel parameter, so it lies in the constant bank.
struct Table {
  Entry entries[kMaxTensors];
  int count, averages;
  float weights[kMaxAverages];
};

template <class T, int kCount>
__device__ inline void update(const Table& table, const EmaTensor& t, int64_t at) {
  const auto p = load_vector<T, kCount>(static_cast<const T*>(t.parameter) + at);
#pragma unroll
  for (int i = 0; i < kMaxAverages; ++i) {
    if (i < table.averages) {
      const float w = table.weights[i];
      const auto a = load_vector<float, kCount>(t.averages[i] + at);
      float average[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const float step = p[k] - a[k];
        average[k] = w < 0.5f ? fmaf(w, step, a[k]) : fmaf(w - 1.0f, step, p[k]);
      }
      store_vector<float, kCount>(t.averages[i] + at, average);
    }
  }
}

// Updates this block's elements of a tensor.
template <class T>
__device__ inline void update_block(const Table& table, const Entry& entry) {
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - entry.first_block) * kBlockElements;
  const int64_t rest = entry.tensor.size - begin;
  const int64_t end = begin + (rest < kBlockElements ? rest : kBlockElements);
  const int64_t whole = entry.aligned ? begin + (end - begin) / kWidth * kWidth : begin;
  for (int64_t at = begin + threadIdx.x * kWidth; at < whole; at += kThreads * kWidth) {
    update<T, kWidth>(table, entry.tensor, at);
  }
  for (int64_t at = whole + threadIdx.x; at < end; at += kThreads) {
    update<T, 1>(table, entry.tensor, at);
  }
}

__global__ void __launch_bounds__(kThreads) ema_kernel(const __grid_constant__ Table table) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.entries[middle].first_block <= static_cast<int>(blockIdx.x) ? low : high) = middle;
  }
  const Entry& entry = table.entries[low];
  if (entry.tensor.dtype == DType::f32) {
    update_block<float>(table, entry);
  } else if (entry.tensor.dtype == DType::bf16) {
    update_block<__nv_bfloat16>(table, entry);
  } else {
    update_block<__half>(table, entry);
  }
}

bool aligned(const EmaTensor& tensor) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(tensor.parameter);
  for (const float* average : tensor.averages) bits |= reinterpret_cast<uintptr_t>(average);
  return bits % kVectorBytes == 0;
}

}  // namespace

const char* ema(const EmaParams& p, void* stream) {
  for (int64_t first = 0; first < p.count; first += kMaxTensors) {
    Table table{};
    table.averages = p.averages;
    for (int i = 0; i < p.averages; ++i) table.weights[i] = p.weights[i];
    int64_t blocks = 0;
    for (int64_t i = first; i < p.count && table.count < kMaxTensors; ++i) {
      const EmaTensor& tensor = p.tensors[i];
      table.entries[table.count++] = {tensor, static_cast<int>(blocks), aligned(tensor)};
      blocks += (tensor.size + kBlockElements - 1) / kBlockElements;
    }
    if (blocks == 0) continue;
    const cudaError_t status = launch(ema_kernel, dim3(static_cast<unsigned>(blocks)),
                                      dim3(kThreads), 0, static_cast<cudaStream_t>(stream), table);
    if (status != cudaSuccess) return error_sentence(status);
  }
  return nullptr;
}

}  // namespace pmf::cuda
