// Gated residual on CUDA: values, tangents and gradients. The mathematics is in
// pmf/gated_residual.h.
//
// Tiling, forward: a thread processes one 16-byte slot of every operand at a time (rows.cuh); the
// gate is the same for neighbouring rows and hits in L1. Backward: a block processes a run of rows;
// its threads own columns and accumulate the gate's gradient in registers (row_sums.cuh).
//
// Bytes, in units of one [rows, W] tensor: forward 3 (x, b, y), with tangents 6; backward 3 (Y, b,
// db), through both outputs 6. With at most three FMAs per 3 elements moved, copy bandwidth is the
// bound: [256, 276, 768] in bf16 would take 0.11 ms at 3.0 TB/s, 0.22 ms with tangents (estimates;
// not measured). Sums are in fp32; each result is rounded once, at the store.
#include "pmf/gated_residual.h"

#include "cuda/rows/row_sums.cuh"

namespace pmf::cuda {
namespace {

template <bool kTangent>
struct Forward {
  GatedResidualParams p;

  template <class Access>
  __device__ void run(const SlotIo<Access>& io) const {
    constexpr int kWidth = Access::kWidth;
    const auto x = io.load(p.x);
    const auto b = io.load(p.branch);
    const auto g = io.load(p.gate);
    float y[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) y[k] = fmaf(g[k], b[k], x[k]);
    io.store(p.y, y);
    if constexpr (kTangent) {
      const auto tx = io.load(p.x_t);
      const auto tb = io.load(p.branch_t);
      const auto tg = io.load(p.gate_t);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) y[k] = fmaf(tg[k], b[k], fmaf(g[k], tb[k], tx[k]));
      io.store(p.y_t, y);
    }
  }
};

// ---- backward ----------------------------------------------------------------------------------

constexpr int kThreads = 256;

// The gate's gradients, summed over rows for the columns of this thread.
template <class Access, bool kTangent>
using GateSums = ColumnSums<Access, 1, kTangent ? 2 : 1>;

template <class Access, bool kTangent>
__device__ inline void backward_rows(const GatedResidualBackwardParams& p, int64_t first,
                                     int64_t last, int64_t column,
                                     GateSums<Access, kTangent>& sums) {
  constexpr int kWidth = Access::kWidth;
  for (int64_t r = first + threadIdx.y; r < last; r += blockDim.y) {
    const SlotIo<Access> io{RowIndex(p.shape, r), column, p.shape.width};
    const auto y = io.load(p.grad);
    const auto b = io.load(p.branch);
    const auto g = io.load(p.gate);
    typename Access::Slot t{}, tb{}, tg{};
    if constexpr (kTangent) {
      t = io.load(p.grad_t);
      tb = io.load(p.branch_t);
      tg = io.load(p.gate_t);
    }
    float db[kWidth], db_t[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      db[k] = g[k] * y[k];
      sums.sum[0][0][k] = fmaf(b[k], y[k], sums.sum[0][0][k]);
      if constexpr (kTangent) {
        db[k] = fmaf(tg[k], t[k], db[k]);
        db_t[k] = g[k] * t[k];
        sums.sum[0][0][k] = fmaf(tb[k], t[k], sums.sum[0][0][k]);
        sums.sum[1][0][k] = fmaf(b[k], t[k], sums.sum[1][0][k]);
      }
    }
    io.store(p.grad_branch, db);
    if constexpr (kTangent) io.store(p.grad_branch_t, db_t);
  }
}

// A group with a single run needs no second stage: its sums are the gradient. Without the 1 in
// __launch_bounds__, nvcc 13.0 limits the kernel to 64 registers on sm_90a and spills.
template <class Access, bool kTangent>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ GatedResidualBackwardParams p,
                    const __grid_constant__ RowSums sums, int64_t rows) {  // rows per group
  using T = typename Access::Element;
  constexpr int kKinds = kTangent ? 2 : 1;
  float* const shared = reinterpret_cast<float*>(dynamic_shared());
  float* const workspace = static_cast<float*>(p.workspace);
  const int64_t width = p.shape.width;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * blockDim.x * Access::kWidth;
  for (int64_t item = blockIdx.y; item < p.groups * sums.runs; item += gridDim.y) {
    const int64_t group = divide(item, sums.runs), run = item - group * sums.runs;
    const int64_t first = run * sums.run_rows, end = first + sums.run_rows;
    GateSums<Access, kTangent> gate;
    backward_rows<Access, kTangent>(p, group * rows + first,
                                    group * rows + (end < rows ? end : rows),
                                    tile + threadIdx.x * Access::kWidth, gate);
    gate.finish(tile, width, shared, [&](int kind, int64_t column, float total) {
      if (sums.runs > 1) {
        workspace[(item * kKinds + kind) * sums.pitch + column] = total;
      } else {
        T* const out = static_cast<T*>(kind == 0 ? p.grad_gate : p.grad_gate_t);
        out[group * width + column] = from_float<T>(total);
      }
    });
  }
}

template <class Access, bool kTangent>
cudaError_t launch_backward(const GatedResidualBackwardParams& p, cudaStream_t stream) {
  const RowSums sums = gate_sums(p, true);
  const int64_t slots = (p.shape.width + Access::kWidth - 1) / Access::kWidth;
  const int64_t tiles = (slots + kThreads - 1) / kThreads;
  const int along = team_width((slots + tiles - 1) / tiles);
  const int64_t runs = p.groups * sums.runs;
  const dim3 block(along, kThreads / along);
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(runs < kMaxBlocksDown ? runs : kMaxBlocksDown));
  const cudaError_t status = launch(backward_kernel<Access, kTangent>, grid, block,
                                    GateSums<Access, kTangent>::shared_bytes(block), stream, p,
                                    sums, p.shape.rows() / p.groups);
  if (status != cudaSuccess || sums.runs == 1) return status;
  return add_runs<typename Access::Element>(sums, p.groups, p.shape.width, p.workspace, p.grad_gate,
                                            kTangent ? p.grad_gate_t : nullptr, stream);
}

template <class Access>
cudaError_t launch_backward(const GatedResidualBackwardParams& p, cudaStream_t stream) {
  return p.grad_t.data == nullptr ? launch_backward<Access, false>(p, stream)
                                  : launch_backward<Access, true>(p, stream);
}

}  // namespace

const char* gated_residual(const GatedResidualParams& p, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const RowOperands operands{p.x, p.branch, p.gate, p.y, p.x_t, p.branch_t, p.gate_t, p.y_t};
    return p.x_t.data == nullptr ? for_slots<T>(Forward<false>{p}, p.shape, operands, queue)
                                 : for_slots<T>(Forward<true>{p}, p.shape, operands, queue);
  });
}

const char* gated_residual_backward(const GatedResidualBackwardParams& p, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool aligned = rows_aligned(
        p.shape, Whole<T>::kWidth,
        {p.grad, p.grad_t, p.branch, p.gate, p.branch_t, p.gate_t, p.grad_branch, p.grad_branch_t});
    return aligned ? launch_backward<Whole<T>>(p, queue) : launch_backward<Pairs<T>>(p, queue);
  });
}

}  // namespace pmf::cuda
