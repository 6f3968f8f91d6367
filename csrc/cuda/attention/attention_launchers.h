// Launch functions for attention.
#pragma once

#include "cuda/common/device.h"
#include "pmf/attention.h"
#include "pmf/attention_backward.h"

namespace pmf::cuda {

const char* attention_forward(const AttentionParams& params, void* stream);
const char* attention_backward(const AttentionBackwardParams& params, void* stream);

}  // namespace pmf::cuda
