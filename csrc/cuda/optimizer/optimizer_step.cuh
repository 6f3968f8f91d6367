// The coefficients of an optimizer's step k, computed on the device: one thread increments the step
// and writes what StepParams describes, in fp64 until the final rounding. A captured graph thus
// follows the step count, and a learning rate and weight decay that live on the device.
#pragma once

#include "cuda/common/launch.cuh"
#include "pmf/optimizer.h"

namespace pmf::cuda {

enum Coefficient : int {
  kOfMomentum,
  kOfGradient,
  kDecay,
  kLearningRate,
  kOfSquare,
  kCoefficients
};

__device__ inline double read(const DeviceScalar& scalar) {
  if (scalar.data == nullptr) return scalar.value;
  return scalar.dtype == DType::f64 ? *static_cast<const double*>(scalar.data)
                                    : *static_cast<const float*>(scalar.data);
}

static __global__ void step_kernel(const __grid_constant__ StepParams p, float* coefficients) {
  const int64_t k = *p.step + 1;
  *p.step = k;
  const double now = p.bias_correction ? 1 - pow(p.momentum, static_cast<double>(k)) : 1,
               next = p.bias_correction ? 1 - pow(p.momentum, static_cast<double>(k + 1)) : 1;
  const double lr = read(p.lr);
  const double of_momentum = p.nesterov ? p.momentum / next : 1 / now,
               of_gradient = p.nesterov ? (1 - p.momentum) / now : 0;
  coefficients[kOfMomentum] = static_cast<float>(of_momentum);
  coefficients[kOfGradient] = static_cast<float>(of_gradient);
  coefficients[kDecay] = static_cast<float>(1 - lr * read(p.weight_decay));
  coefficients[kLearningRate] = static_cast<float>(lr);
  coefficients[kOfSquare] = static_cast<float>(1 / (1 - pow(p.beta2, static_cast<double>(k))));
}

}  // namespace pmf::cuda
