// The Hopper attention forward, which the general launcher tries first.
#pragma once

#include "pmf/attention.h"

namespace pmf::cuda {

// Launches a call that is regular (attention_forward_plan.h) apart from a window or packed
// sequences, if these kernels support it (16-bit types; width 64, 80, 96 or 128; an sm_90 device
// whose driver encodes tensor maps), and sets `problem` to an error sentence or null. Returns false
// if the call is for the other kernels.
bool hopper_forward(const AttentionParams& params, void* stream, const char*& problem);

}  // namespace pmf::cuda
