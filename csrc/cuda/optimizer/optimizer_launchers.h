// Launch functions for the optimizers other than Muon.
#pragma once

#include "cuda/common/device.h"
#include "pmf/ema.h"
#include "pmf/optimizer.h"

namespace pmf::cuda {

const char* ema(const EmaParams& params, void* stream);
int64_t adam_workspace_bytes();
const char* adam(const AdamParams& params, void* stream);

}  // namespace pmf::cuda
