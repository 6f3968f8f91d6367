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

  // `factor`: of the product.
  __device__ Step(const TargetTable& table, const Target& target, float factor)
      : moves(table.coefficients != nullptr), decay(0), factor(factor) {
    if (!moves) return;
    decay = table.coefficients[kDecay];
    this->factor *= -table.coefficients[kLearningRate] * target.scale;
  }
  __device__ float operator()(float value, float old) const {
    return moves ? fmaf(factor, value, decay * old) : factor * value;
  }
};

// A warp's sums of 16 rows and 64 columns, in the accumulators' layout (ptx.cuh), between the
// product and the update. Registers have no index, so a loop over a warp's sums, which contains the
// code for all kinds of targets only once, takes them from shared memory, where each lane writes
// and reads for itself.
struct StagedSums {
  static constexpr int kBlocks = 8;  // of eight columns
  static constexpr int kBytes = kBlocks * kWarpThreads * int(sizeof(float4));
  using Sums = float[kBlocks][4];

  float4* own;

  __device__ explicit StagedSums(unsigned char* shared)
      : own(reinterpret_cast<float4*>(shared) + threadIdx.x % kWarpThreads) {}

  __device__ void write(const float (*d)[4]) const {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      own[n * kWarpThreads] = make_float4(d[n][0], d[n][1], d[n][2], d[n][3]);
    }
  }
  __device__ void read(Sums& d) const {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const float4 sums = own[n * kWarpThreads];
      d[n][0] = sums.x, d[n][1] = sums.y, d[n][2] = sums.z, d[n][3] = sums.w;
    }
  }
};

// Where the lane's sums are in the target: in two rows, two columns of every eight. A warp accesses
// whole sectors: 32 bytes of eight rows or, if the target is tall, of four columns.
template <bool kTall, int kWidth>  // kWidth: elements per access
struct TargetPlaces {
  using Sums = StagedSums::Sums;

  int64_t first;
  int pitch;      // elements from a row of the target to the next
  int blocks[4];  // that have element q of the lane inside the target

  // rows, columns: of X.
  __device__ TargetPlaces(int rows, int columns, int row, int column)
      : pitch(kTall ? rows : columns) {
    const int lane = int(threadIdx.x) % kWarpThreads, i = row + lane / 4, j = column + lane % 4 * 2;
    first = kTall ? int64_t(j) * pitch + i : int64_t(i) * pitch + j;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      blocks[q] = i + q / 2 * 8 < rows ? (columns - j - q % 2 + 7) / 8 : 0;
    }
  }

  // Calls access(address, n, q) for every access inside the target, to element q of block n.
  template <class T, class Access>
  __device__ void for_each(T* data, const Access& access) const {
    const int step = opaque(pitch);  // so that no addresses wait in registers from load to store
    data += first;
#pragma unroll
    for (int q = 0; q < 4; q += kWidth) {
      const int count = opaque(blocks[q]);
#pragma unroll
      for (int n = 0; n < StagedSums::kBlocks; ++n) {
        const int i = q / 2 * 8, j = 8 * n + q % 2;
        if (n < count) access(data + int64_t(kTall ? j : i) * step + (kTall ? i : j), n, q);
      }
    }
  }
  // Calls take(x, value) for every element.
  template <class T, class Take>
  __device__ void load(Sums& x, const T* data, const Take& take) const {
    for_each(data, [&](const T* address, int n, int q) {
      const auto loaded = load_vector<T, kWidth>(address);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) take(x[n][q + e], loaded.element[e]);
    });
  }
  template <class T>
  __device__ void store(const Sums& x, T* data) const {
    for_each(data, [&](T* address, int n, int q) {
      float values[kWidth];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) values[e] = x[n][q + e];
      store_vector(address, values);
    });
  }
};

// Updates of one matrix's target.
class Updates {
 public:
  __device__ Updates(const TargetTable& table, const Product& product, int matrix)
      : target_(table.targets[product.first_matrix + matrix]),
        dtype_(table.dtype),
        step_(table, target_, product.factor_of(matrix)),
        rows_(product.rows),
        columns_(product.columns) {}

  // Updates 16 rows and 64 columns of X at (row, column); called by a warp.
  __device__ void operator()(const StagedSums& sums, int row, int column) const {
    const auto data = reinterpret_cast<uintptr_t>(target_.data),
               master = reinterpret_cast<uintptr_t>(target_.master);
    const unsigned size = dtype_ == DType::f32 ? sizeof(float) : sizeof(uint16_t);
    if (target_.tall) {
      update(TargetPlaces<true, 1>(rows_, columns_, row, column), sums);
    } else if (columns_ % 2 == 0 && data % (2 * size) == 0 && master % sizeof(float2) == 0) {
      update(TargetPlaces<false, 2>(rows_, columns_, row, column), sums);
    } else {
      update(TargetPlaces<false, 1>(rows_, columns_, row, column), sums);
    }
  }

 private:
  template <class Places>
  __device__ void update(const Places& places, const StagedSums& sums) const {
    switch (dtype_) {
      case DType::bf16:
        return update<__nv_bfloat16>(places, sums);
      case DType::f16:
        return update<__half>(places, sums);
      default:
        return update<float>(places, sums);
    }
  }

  template <class T, class Places>
  __device__ void update(const Places& places, const StagedSums& sums) const {
    T* const data = static_cast<T*>(target_.data);
    const bool has_master = sizeof(T) < sizeof(float) && target_.master != nullptr;
    StagedSums::Sums d, x = {};
    if (step_.moves) {
      const auto take = [](float& old, float value) { old = value; };
      if (has_master) places.load(x, target_.master, take);
      places.load(x, data, [&](float& old, T value) {
        // The master weight counts, unless the parameter was changed externally.
        if (!has_master || to_float(from_float<T>(old)) != to_float(value)) old = to_float(value);
      });
    }
    sums.read(d);
#pragma unroll
    for (int n = 0; n < StagedSums::kBlocks; ++n) {
#pragma unroll
      for (int q = 0; q < 4; ++q) x[n][q] = step_(d[n][q], x[n][q]);
    }
    if (has_master) places.store(x, target_.master);
    places.store(x, data);
  }

  const Target& target_;
  DType dtype_;
  Step step_;
  int rows_, columns_;
};

}  // namespace pmf::cuda::ns
