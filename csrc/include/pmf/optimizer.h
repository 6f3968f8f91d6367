// Optimizer steps on the device: the numbers that change from step to step, and Adam.
//
// Whatever a captured CUDA graph must follow (the step count, a learning rate that a schedule
// moves) is read from device memory; all else is a number here.
#pragma once

#include "pmf/common.h"

namespace pmf {

// A number in device memory (f32 or f64), or the value here where `data` is null.
struct DeviceScalar {
  const void* data = nullptr;
  DType dtype = DType::f32;
  double value = 0;
};

// What the step k = *step + 1 multiplies by:
//   of momentum, of gradient   mu / (1 - mu^(k+1)), (1 - mu) / (1 - mu^k)   Nesterov,
//   bias-corrected
//                              mu, 1 - mu                                   Nesterov
//                              1 / (1 - mu^k) or 1, 0                       neither or no Nesterov
//   decay                      1 - lr wd
//   lr
//   of square                  1 / (1 - beta2^k)
struct StepParams {
  int64_t* step = nullptr;  // [1] device memory, counted up by one
  DeviceScalar lr;
  DeviceScalar weight_decay;
  double momentum = 0;  // mu; Adam's beta1
  double beta2 = 0;     // Adam's; Muon has none
  bool nesterov = true;
  bool bias_correction = true;
};

// Parameters that share a dtype and a step count; all tensors contiguous.
struct AdamTensor {
  void* parameter = nullptr;       // [size] dtype
  const void* gradient = nullptr;  // [size] dtype
  float* momentum = nullptr;       // [size]
  float* square = nullptr;         // [size]
  float* master = nullptr;         // [size], of a 16-bit parameter
  int64_t size = 0;
};

struct AdamParams {
  DType dtype = DType::f32;  // f32, bf16, f16
  const AdamTensor* tensors = nullptr;
  int64_t count = 0;
  StepParams step;
  double eps = 0;
  void* workspace = nullptr;  // adam_workspace_bytes() of device memory
};

}  // namespace pmf
