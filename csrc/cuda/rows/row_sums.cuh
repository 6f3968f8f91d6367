// Sums over rows for the gradients of weights and gates: two stages with a fixed summation order.
//
// A block processes a run of rows (RowSums): each thread accumulates its own columns in registers,
// then the block's teams, which process different rows, are summed in shared memory, and the run's
// vector goes to the workspace: [groups, runs, kinds, pitch] in fp32. A second kernel sums the
// runs. The workspace, at most 1024 vectors for thousands of rows, is written and read once.
#pragma once

#include "cuda/common/shared.cuh"
#include "cuda/rows/rows.cuh"

namespace pmf::cuda {

// Threads along a row of `slots` slots: a power of two up to a warp, otherwise whole warps.
inline int team_width(int64_t slots) {
  int along = 1;
  while (along < slots && along < kWarpThreads) along *= 2;
  return along < kWarpThreads
             ? along
             : static_cast<int>((slots + kWarpThreads - 1) / kWarpThreads * kWarpThreads);
}

// A thread's sums over kVectors slots that are blockDim.x slots apart. In the block, x runs along
// the row and y over rows.
template <class Access, int kVectors, int kKinds>
struct ColumnSums {
  static constexpr int kWidth = Access::kWidth;
  float sum[kKinds][kVectors][kWidth] = {};

  static int64_t shared_bytes(dim3 block) {
    return block.y == 1 ? 0 : sizeof(ColumnSums) * block.x * block.y;
  }

  // Resumes from the vectors that this thread stored in an earlier finish(), or from zero (null).
  __device__ void load(const float* vectors, int64_t pitch, int64_t first, int64_t width) {
#pragma unroll
    for (int kind = 0; kind < kKinds; ++kind) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int64_t column = first + (v * blockDim.x + threadIdx.x) * kWidth;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const bool exists = vectors != nullptr && column + k < width;
          sum[kind][v][k] = exists ? vectors[kind * pitch + column + k] : 0.0f;
        }
      }
    }
  }

  // Calls put(kind, column, sum over the block) for every column from `first` on. All threads call
  // this; `shared` has shared_bytes() bytes and is free for other uses on return.
  template <class Put>
  __device__ void finish(int64_t first, int64_t width, float* shared, const Put& put) const {
    const int columns = blockDim.x * kVectors * kWidth;
#pragma unroll
    for (int kind = 0; kind < kKinds; ++kind) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int column = (v * blockDim.x + threadIdx.x) * kWidth;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          if (blockDim.y > 1) {
            shared[(threadIdx.y * kKinds + kind) * columns + column + k] = sum[kind][v][k];
          } else if (first + column + k < width) {
            put(kind, first + column + k, sum[kind][v][k]);
          }
        }
      }
    }
    if (blockDim.y == 1) return;
    __syncthreads();
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < kKinds * columns;
         i += blockDim.x * blockDim.y) {
      float total = 0;
      for (int y = 0; y < static_cast<int>(blockDim.y); ++y)
        total += shared[y * kKinds * columns + i];
      const int kind = i / columns, column = i - kind * columns;
      if (first + column < width) put(kind, first + column, total);
    }
    __syncthreads();
  }
};

// ---- the second stage --------------------------------------------------------------------------

constexpr int kRunLanes = 16;  // threads that split the runs of a column

struct AddRuns {
  const float* runs;  // [groups, runs, kinds, pitch]
  void* out[2];       // [groups, W] for each kind
  int64_t count, pitch, width, column_blocks;
  int kinds;
};

template <typename T>
__global__ void __launch_bounds__(kWarpThreads* kRunLanes)
    add_runs_kernel(const __grid_constant__ AddRuns p) {
  float* const shared = reinterpret_cast<float*>(dynamic_shared());
  const int kind = blockIdx.y;
  const int64_t group = blockIdx.x / p.column_blocks;
  const int64_t column = (blockIdx.x - group * p.column_blocks) * kWarpThreads + threadIdx.x;
  float total = 0;
  if (column < p.width) {
    const float* at = p.runs + (group * p.count * p.kinds + kind) * p.pitch + column;
#pragma unroll 4
    for (int64_t run = threadIdx.y; run < p.count; run += kRunLanes) {
      total += at[run * p.kinds * p.pitch];
    }
  }
  shared[threadIdx.y * kWarpThreads + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= p.width) return;
  for (int y = 1; y < kRunLanes; ++y) total += shared[y * kWarpThreads + threadIdx.x];
  T* const out = static_cast<T*>(kind == 0 ? p.out[0] : p.out[1]);
  out[group * p.width + column] = from_float<T>(total);
}

// out[kind][group, i] = sum over the group's runs. `second` is null if there is one kind.
template <typename T>
cudaError_t add_runs(const RowSums& sums, int64_t groups, int64_t width, const void* workspace,
                     void* first, void* second, cudaStream_t stream) {
  if (groups * width == 0) return cudaSuccess;
  AddRuns p{static_cast<const float*>(workspace),
            {first, second},
            sums.runs,
            sums.pitch,
            width,
            (width + kWarpThreads - 1) / kWarpThreads,
            second == nullptr ? 1 : 2};
  const dim3 grid(static_cast<unsigned>(groups * p.column_blocks), p.kinds);
  return launch(add_runs_kernel<T>, grid, dim3(kWarpThreads, kRunLanes),
                kWarpThreads * kRunLanes * sizeof(float), stream, p);
}

}  // namespace pmf::cuda
