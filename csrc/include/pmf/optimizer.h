// Optimizer steps on the device: the values that change between steps, and Adam.
//
// What a captured CUDA graph must follow (the step count, a scheduled learning rate) is read from
// device memory; everything else is a plain value here.
#pragma once

#include "pmf/common.h"

namespace pmf {

// A number in device memory (f32 or f64), or `value` if `data` is null.
struct DeviceScalar {
  const void* data = nullptr;
  DType dtype = DType::f32;
  double value = 0;
};

// The factors of step k = *step + 1:
//   of momentum, of gradient   mu / (1 - mu^(k+1)), (1 - mu) / (1 - mu^k)   Nesterov and correction
//                              mu, 1 - mu                                   Nesterov only
//                              1 / (1 - mu^k), 0                            bias correction only
//                              1, 0                                         neither
//   decay                      1 - lr wd
//   lr                         lr
//   of square                  1 / (1 - beta2^k)
struct StepParams {
  int64_t* step = nullptr;  // [1] device memory, incremented by the step
  DeviceScalar lr;
  DeviceScalar weight_decay;
  double momentum = 0;  // mu (Adam: beta1)
  double beta2 = 0;     // Adam only
  bool nesterov = true;
  bool bias_correction = true;
};

// Parameters that share a dtype and a step count; all tensors contiguous.
struct AdamTensor {
  void* parameter = nullptr;       // [size] dtype
  const void* gradient = nullptr;  // [size] dtype
  float* momentum = nullptr;       // [size]
  float* square = nullptr;         // [size]
  float* master = nullptr;         // [size], for 16-bit parameters
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
