// The Hopper attention backward, which the general launcher tries first.
#pragma once

#include "pmf/attention_backward.h"

namespace pmf::cuda {

// Launches a regular call (attention_backward_plan.h) without tangents if these kernels support it
// (16-bit types; width 64, 80, 96 or 128; an sm_90 device whose driver encodes tensor maps), and
// sets `problem` to an error sentence or null. Returns false if the call is for the other kernels.
bool hopper_backward(const AttentionBackwardParams& params, void* stream, const char*& problem);

// The same for calls with tangents: through both outputs, width 64.
bool hopper_backward_tangents(const AttentionBackwardParams& params, void* stream,
                              const char*& problem);

}  // namespace pmf::cuda
