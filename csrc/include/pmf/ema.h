// Exponential moving averages of many tensors, several averages of each: a <- a + w (p - a).
//
// CUDA only; on the CPU, pmf/optim/ema.py uses PyTorch, one average at a time.
//
// Bytes per element: the parameter once (4 or 2), 8 per average.
#pragma once

#include "pmf/common.h"

namespace pmf {

constexpr int kMaxAverages = 4;  // per launch; csrc/ops splits longer lists into several launches

struct EmaTensor {
  const void* parameter = nullptr;     // [size] dtype
  DType dtype = DType::f32;            // f32, bf16, f16
  float* averages[kMaxAverages] = {};  // [size] each, EmaParams::averages of them
  int64_t size = 0;
};

struct EmaParams {
  const EmaTensor* tensors = nullptr;
  int64_t count = 0;
  int averages = 0;
  float weights[kMaxAverages] = {};  // w of each average, in [0, 1]
};

}  // namespace pmf
