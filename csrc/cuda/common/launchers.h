// Host side of the CUDA kernels: launch functions, in the words of the contract headers. No torch
// and no CUDA types, so that csrc/ops needs no toolkit to compile; a stream is an opaque pointer.
//
// A launch function returns null, or one sentence about what went wrong.
#pragma once

#include "pmf/attention.h"
#include "pmf/attention_backward.h"
#include "pmf/ema.h"
#include "pmf/gated_residual.h"
#include "pmf/newton_schulz.h"
#include "pmf/optimizer.h"
#include "pmf/patch_embed.h"
#include "pmf/patch_velocity.h"
#include "pmf/rms_norm.h"
#include "pmf/rotary_qk_norm.h"
#include "pmf/swiglu.h"

namespace pmf::cuda {

// Null if kernels of this library can run on the device, else why not: no driver, a driver older
// than the runtime this was compiled with, or a device older than sm_80. Looked up once per device.
const char* device_problem(int device);

const char* attention_forward(const AttentionParams& params, void* stream);
const char* attention_backward(const AttentionBackwardParams& params, void* stream);
const char* ema(const EmaParams& params, void* stream);
const char* gated_residual(const GatedResidualParams& params, void* stream);
const char* gated_residual_backward(const GatedResidualBackwardParams& params, void* stream);
const char* patch_embed(const PatchEmbedParams& params, void* stream);
const char* patch_embed_backward(const PatchEmbedBackwardParams& params, void* stream);
const char* patch_velocity(const PatchVelocityParams& params, void* stream);
const char* patch_velocity_backward(const PatchVelocityBackwardParams& params, void* stream);
const char* rms_norm(const RmsNormParams& params, void* stream);
const char* rms_norm_backward(const RmsNormBackwardParams& params, void* stream);
const char* rotary_qk_norm(const RotaryQkNormParams& params, void* stream);
const char* rotary_qk_norm_backward(const RotaryQkNormBackwardParams& params, void* stream);
const char* swiglu(const SwigluParams& params, void* stream);
const char* swiglu_backward(const SwigluBackwardParams& params, void* stream);

// Newton-Schulz, and with params.muon a step of Muon; Adam's step.
int64_t newton_schulz_workspace_bytes(const NewtonSchulzParams& params);
const char* newton_schulz(const NewtonSchulzParams& params, void* stream);
int64_t adam_workspace_bytes();
const char* adam(const AdamParams& params, void* stream);

// What a CUDA runtime status means; null for success. (int: cudaError_t.)
const char* error_sentence(int status);

}  // namespace pmf::cuda
