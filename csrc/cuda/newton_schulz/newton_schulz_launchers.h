// Launch functions of Newton-Schulz; if params.muon is set, of a Muon step.
#pragma once

#include "cuda/common/device.h"
#include "pmf/newton_schulz.h"

namespace pmf::cuda {

int64_t newton_schulz_workspace_bytes(const NewtonSchulzParams& params);
const char* newton_schulz(const NewtonSchulzParams& params, void* stream);

}  // namespace pmf::cuda
