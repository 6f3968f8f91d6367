// Launch functions of the patch embedding and of the velocity read-out.
#pragma once

#include "cuda/common/device.h"
#include "pmf/patch_embed.h"
#include "pmf/patch_velocity.h"

namespace pmf::cuda {

const char* patch_embed(const PatchEmbedParams& params, void* stream);
const char* patch_embed_backward(const PatchEmbedBackwardParams& params, void* stream);
const char* patch_velocity(const PatchVelocityParams& params, void* stream);
const char* patch_velocity_backward(const PatchVelocityBackwardParams& params, void* stream);

}  // namespace pmf::cuda
