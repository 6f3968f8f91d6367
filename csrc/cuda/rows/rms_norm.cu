// RMSNorm on CUDA: values, tangents and gradients. The mathematics is in pmf/rms_norm.h, the
// per-row computation in norm.cuh.
//
// Tiling: a team of threads processes a row: 64 threads for 768 16-bit elements. Backward: a block
// processes a run of rows and accumulates the weight's gradient; a second kernel sums the runs.
//
// Bytes, in units of one [rows, W] tensor: forward 2, with tangents 4; backward 3, through both
// outputs 6. Copy bandwidth is the bound: [256, 276, 768] in bf16 would take 0.07 ms at 3.0 TB/s,
// 0.15 ms with tangents (estimates; not measured). Sums are in fp32; each result is rounded once,
// at the store.
#include "pmf/rms_norm.h"

#include "cuda/rows/norm.cuh"

namespace pmf::cuda {
namespace {

template <class Access, bool kTangent>
__global__ void __launch_bounds__(kMaxTeam)
    forward_kernel(const __grid_constant__ RmsNormParams p, int64_t rows) {
  norm_rows<Access, kTangent>(p, NoTurns{}, rows, reinterpret_cast<float*>(dynamic_shared()));
}

template <class Access, bool kTangent>
__global__ void __launch_bounds__(kMaxTeam)
    backward_kernel(const __grid_constant__ RmsNormBackwardParams p,
                    const __grid_constant__ RowSums sums, int64_t rows) {
  norm_rows_backward<Access, kTangent>(p, NoTurns{}, sums, blockIdx.x, rows,
                                       reinterpret_cast<float*>(dynamic_shared()));
}

template <class Access, bool kTangent>
cudaError_t forward(const RmsNormParams& p, cudaStream_t stream) {
  const dim3 block = team_block(p.shape.width, kForwardVectors * Access::kWidth);
  const int64_t rows = p.shape.rows(), blocks = (rows + block.y - 1) / block.y;
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  return launch(forward_kernel<Access, kTangent>, grid, block, TeamSums::kSharedBytes, stream, p,
                rows);
}

template <class Access, bool kTangent>
cudaError_t backward(const RmsNormBackwardParams& p, cudaStream_t stream) {
  const int64_t rows = p.shape.rows();
  const RowSums sums = RowSums::on_gpu(1, rows, p.shape.width);
  const dim3 block = team_block(p.shape.width, kBackwardVectors * Access::kWidth);
  const cudaError_t status =
      launch(backward_kernel<Access, kTangent>, dim3(static_cast<unsigned>(sums.runs)), block,
             norm_shared_bytes<WeightSums<Access, kTangent>>(block), stream, p, sums, rows);
  if (status != cudaSuccess) return status;
  return add_runs<typename Access::Element>(sums, 1, p.shape.width, p.workspace, p.grad_weight,
                                            kTangent ? p.grad_weight_t : nullptr, stream);
}

// A vector as an operand of rows_aligned().
ConstRows vector(const void* data) {
  ConstRows rows;
  rows.data = data;
  return rows;
}

}  // namespace

const char* rms_norm(const RmsNormParams& p, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const ConstRows weight = vector(p.weight), weight_t = vector(p.weight_t);
    const bool aligned =
        rows_aligned(p.shape, Whole<T>::kWidth, {p.x, p.x_t, weight, weight_t, p.y, p.y_t});
    if (p.x_t.data == nullptr) {
      return aligned ? forward<Whole<T>, false>(p, queue) : forward<Pairs<T>, false>(p, queue);
    }
    return aligned ? forward<Whole<T>, true>(p, queue) : forward<Pairs<T>, true>(p, queue);
  });
}

const char* rms_norm_backward(const RmsNormBackwardParams& p, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const ConstRows weight = vector(p.weight), weight_t = vector(p.weight_t);
    const bool aligned =
        rows_aligned(p.shape, Whole<T>::kWidth,
                     {p.grad, p.grad_t, p.x, p.x_t, weight, weight_t, p.grad_x, p.grad_x_t});
    if (p.grad_t.data == nullptr) {
      return aligned ? backward<Whole<T>, false>(p, queue) : backward<Pairs<T>, false>(p, queue);
    }
    return aligned ? backward<Whole<T>, true>(p, queue) : backward<Pairs<T>, true>(p, queue);
  });
}

}  // namespace pmf::cuda
