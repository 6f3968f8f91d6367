// Launch functions of Newton-Schulz; with params.muon it is a step of Muon.
#pragma once

#include "cuda/common/device.h"
#include "pmf/newton_schulz.h"

namespace pmf::cuda {

int64_t newton_schulz_workspace_bytes(const NewtonSchulzParams& params);
const char* newton_schulz(const NewtonSchulzParams& params, void* stream);

}  // namespace pmf::cuda
