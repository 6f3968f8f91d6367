// Newton-Schulz by the CUDA kernels, for csrc/ops/newton_schulz.cpp and csrc/ops/muon.cpp.
#pragma once

#include <string>
#include <vector>

#include "cuda/newton_schulz/newton_schulz_launchers.h"
#include "ops/torch_shim.h"
#include "pmf/newton_schulz.h"

namespace pmf {

inline NewtonSchulzMethod method_named(const std::string& name) {
  return name == "gram"     ? NewtonSchulzMethod::gram
         : name == "direct" ? NewtonSchulzMethod::direct
                            : NewtonSchulzMethod::automatic;
}

// The op on matrices that share a device and a dtype.
std::vector<Tensor> newton_schulz_by_kernels(const std::vector<Tensor>& matrices,
                                             const std::vector<double>& coefficients,
                                             const std::string& method, ScalarType dtype,
                                             bool allow_tf32);

}  // namespace pmf
