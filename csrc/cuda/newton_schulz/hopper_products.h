// The products of Newton-Schulz on Hopper, which the launcher tries first.
#pragma once

#include "cuda/common/cuda.cuh"
#include "cuda/newton_schulz/newton_schulz_plan.h"
#include "cuda/newton_schulz/newton_schulz_updates.cuh"

namespace pmf::cuda::ns {

// Launches products that suit these kernels (takes_warpgroups() in newton_schulz_plan.h) in 16
// bits, and sets `status`. Returns false if the device or its driver cannot run them.
bool hopper_products(const std::vector<Product>& products, DType compute, cudaStream_t stream,
                     cudaError_t& status);
// The same of the last wave.
bool hopper_updates(const std::vector<Product>& products, const TargetTable& targets, DType compute,
                    cudaStream_t stream, cudaError_t& status);

}  // namespace pmf::cuda::ns
