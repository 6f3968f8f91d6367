// Launch functions for the elementwise ops.
#pragma once

#include "cuda/common/device.h"
#include "pmf/gated_residual.h"
#include "pmf/rms_norm.h"
#include "pmf/rotary_qk_norm.h"
#include "pmf/swiglu.h"

namespace pmf::cuda {

const char* gated_residual(const GatedResidualParams& params, void* stream);
const char* gated_residual_backward(const GatedResidualBackwardParams& params, void* stream);
const char* rms_norm(const RmsNormParams& params, void* stream);
const char* rms_norm_backward(const RmsNormBackwardParams& params, void* stream);
const char* rotary_qk_norm(const RotaryQkNormParams& params, void* stream);
const char* rotary_qk_norm_backward(const RotaryQkNormBackwardParams& params, void* stream);
const char* swiglu(const SwigluParams& params, void* stream);
const char* swiglu_backward(const SwigluBackwardParams& params, void* stream);

}  // namespace pmf::cuda
