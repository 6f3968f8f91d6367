// Attention's backward on Hopper: what the launcher of the other kernels asks first.
#pragma once

#include "pmf/attention_backward.h"

namespace pmf::cuda {

// Launches a regular call (attention_backward_plan.h) without tangents that these kernels take, of
// 16 bits, 64, 80, 96 or 128 wide, on an sm_90 whose driver encodes tensor maps, and says in
// `problem` what went wrong or null. False: it is for the other kernels.
bool hopper_backward(const AttentionBackwardParams& params, void* stream, const char*& problem);

}  // namespace pmf::cuda
