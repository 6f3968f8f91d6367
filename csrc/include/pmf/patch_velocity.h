// The network's read-out: tokens to an image x, and the resulting velocity.
//
//   x[b, c, r p + i, q p + j] = tokens[b, r columns + q, (i p + j) C + c]
//   s = clip(t, floor, 1)
//
//   forward    v = (z - x) / s
//              tv = (tz - tx) / s - (tt m / s) v,  m = 1 where s = t, else 0
//   backward   dtokens = -V / s in the tokens' order  (V: the gradient of v)
//
// z are the noisy images. No kernel computes the gradients of z and t.
//
// Bytes, in units of one image: forward 3, with tangent 6; backward 2.
#pragma once

#include "pmf/common.h"

namespace pmf {

struct PatchShape {
  int64_t batch = 0, channels = 0, rows = 0, columns = 0;  // rows, columns: of patches
  int64_t patch = 0;                                       // p
  int64_t token() const { return patch * patch * channels; }
};

// Everything is contiguous: tokens [B, rows columns, p p C], images [B, C, rows p, columns p].
struct PatchVelocityParams {
  DType dtype = DType::f32;        // of tokens
  DType image_dtype = DType::f32;  // of images and velocities: the tokens', or f32 beside 16 bits
  PatchShape shape;
  double floor = 0;
  const void* tokens = nullptr;  // dtype
  const void* images = nullptr;  // image_dtype
  const void* t = nullptr;       // [B] fp32 (fp64 for fp64)
  void* velocity = nullptr;      // image_dtype

  // Of the first n samples, shaped like the above; n = 0: value only.
  int64_t tangents = 0;
  const void* tokens_t = nullptr;
  const void* images_t = nullptr;
  const void* t_t = nullptr;
  void* velocity_t = nullptr;
};

struct PatchVelocityBackwardParams {
  DType dtype = DType::f32;
  DType image_dtype = DType::f32;
  PatchShape shape;
  double floor = 0;
  const void* grad = nullptr;   // like images
  const void* t = nullptr;      // [B] fp32 (fp64 for fp64)
  void* grad_tokens = nullptr;  // like tokens
};

namespace cpu {
void patch_velocity(const PatchVelocityParams& params, const ParallelFor& parallel);
void patch_velocity_backward(const PatchVelocityBackwardParams& params,
                             const ParallelFor& parallel);
}  // namespace cpu

}  // namespace pmf
