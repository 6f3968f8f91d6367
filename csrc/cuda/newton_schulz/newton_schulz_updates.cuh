// The last products of Newton-Schulz leave the workspace: they are stored as results, or update the
// parameters.
#pragma once

#include "cuda/common/ptx.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/newton_schulz/newton_schulz_plan.h"
#include "cuda/optimizer/optimizer_step.cuh"

namespace pmf::cuda::ns {

// Destination of a matrix's last product: a parameter or a result.
struct Target {
  void* data;
  float* master;  // fp32 weights of a 16-bit parameter, or null
  float scale;
  bool tall;  // rows > columns: X is its transpose
};

struct TargetTable {
  Target targets[kMaxMatrices];
  DType dtype;
  const float* coefficients;  // decay, lr; null: targets are results
};

// The arithmetic of the last store.
struct Step {
  bool moves;  // updates a parameter; otherwise stores the result
  float decay, factor;

  __device__ Step(const TargetTable& table, const Target& target)
      : moves(table.coefficients != nullptr), decay(0), factor(1) {
    if (!moves) return;
    decay = table.coefficients[kDecay];
    factor = -table.coefficients[kLearningRate] * target.scale;
  }
};

// A parameter's value: its master weight, unless the parameter was changed externally.
template <class T>
__device__ inline float current(const T* data, const float* master, int64_t at) {
  const float value = to_float(data[at]);
  if (master == nullptr) return value;
  return to_float(from_float<T>(master[at])) == value ? master[at] : value;
}

// Updates of one matrix's target.
class Updates {
 public:
  __device__ Updates(const TargetTable& table, const Product& product, int matrix)
      : product_(product),
        target_(table.targets[product.first_matrix + matrix]),
        dtype_(table.dtype),
        step_(table, target_) {}

  // Stores a tile, whose elements result(row, column) returns, at (top, left); called by `warps`
  // warps.
  template <int kRows, int kColumns, class Result>
  __device__ void tile(const Result& result, int top, int left, int warp, int warps) const {
    switch (dtype_) {
      case DType::bf16:
        return update<__nv_bfloat16, kRows, kColumns>(result, top, left, warp, warps);
      case DType::f16:
        return update<__half, kRows, kColumns>(result, top, left, warp, warps);
      default:
        return update<float, kRows, kColumns>(result, top, left, warp, warps);
    }
  }

 private:
  template <class T, int kRows, int kColumns, class Result>
  __device__ void update(const Result& result, int top, int left, int warp, int warps) const {
    const Product& p = product_;
    T* const data = static_cast<T*>(target_.data);
    const int lane = threadIdx.x % kWarpThreads;
    constexpr int kBatch = 8;  // loads in flight
    for (int batch = warp; batch < kRows * kColumns / kWarpThreads / kBatch; batch += warps) {
      int64_t at[kBatch];
      float value[kBatch], old[kBatch];
      bool valid[kBatch];
#pragma unroll
      for (int q = 0; q < kBatch; ++q) {
        // A warp updates 32 elements of a row of a wide matrix, or 8 rows by 4 columns of X of a
        // tall one, whose rows are columns of X.
        const int group = batch * kBatch + q;
        const int row =
            target_.tall ? group % (kRows / 8) * 8 + lane % 8 : group / (kColumns / kWarpThreads);
        const int column = target_.tall ? group / (kRows / 8) * 4 + lane / 8
                                        : group % (kColumns / kWarpThreads) * kWarpThreads + lane;
        const int i = top + row, j = left + column;
        valid[q] = i < p.rows && j < p.columns;
        at[q] = target_.tall ? static_cast<int64_t>(j) * p.rows + i
                             : static_cast<int64_t>(i) * p.columns + j;
        value[q] = result(row, column);
        old[q] = valid[q] && step_.moves ? current(data, target_.master, at[q]) : 0;
      }
#pragma unroll
      for (int q = 0; q < kBatch; ++q) {
        if (!valid[q]) continue;
        if (step_.moves) value[q] = fmaf(step_.factor, value[q], step_.decay * old[q]);
        if (target_.master != nullptr) target_.master[at[q]] = value[q];
        data[at[q]] = from_float<T>(value[q]);
      }
    }
  }

  const Product& product_;
  const Target& target_;
  DType dtype_;
  Step step_;
};

}  // namespace pmf::cuda::ns
