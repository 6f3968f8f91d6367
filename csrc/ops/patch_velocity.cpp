// torch.ops.pmf.patch_velocity*: validate, allocate, launch. The mathematics is in
// pmf/patch_velocity.h.
#include "pmf/patch_velocity.h"

#include "cuda/patch_embed/patch_embed_launchers.h"
#include "ops/row_binding.h"

namespace pmf {
namespace {

constexpr const char* kOp = "patch_velocity";

// tokens [B, N, p p C] and images [B, C, H, W] fit together with N = (H / p) (W / p).
PatchShape shape_of_patches(const Tensor& tokens, const Tensor& images, const char* name) {
  check_value(tokens.dim() == 3 && images.dim() == 4, kOp, ": tokens must be [B, N, p p C] and ",
              name, " [B, C, H, W], got ", shape_of(tokens), " and ", shape_of(images));
  PatchShape s;
  s.batch = images.size(0);
  s.channels = images.size(1);
  while (s.token() < tokens.size(2) && s.channels > 0) ++s.patch;
  const int64_t height = images.size(2), width = images.size(3);
  const bool divides = s.patch > 0 && height % s.patch == 0 && width % s.patch == 0;
  if (divides) {
    s.rows = height / s.patch;
    s.columns = width / s.patch;
  }
  check_value(divides && s.token() == tokens.size(2) && s.rows * s.columns == tokens.size(1), kOp,
              ": tokens ", shape_of(tokens), " are not [B, N, p p C] for patches of ", name, " ",
              shape_of(images));
  return s;
}

DType image_dtype(const Tensor& images, const Tensor& tokens, const char* name) {
  const bool wide = images.scalar_type() == ScalarType::Float &&
                    dtype_bytes(dtype_of(tokens, kOp, "tokens")) == 2;
  check_value(wide || images.scalar_type() == tokens.scalar_type(), kOp, ": ", name,
              " must have the dtype of tokens, or float32 beside 16 bits, got ",
              dtype_name(images.scalar_type()), " and ", dtype_name(tokens.scalar_type()));
  return dtype_of(images, kOp, name);
}

void check_times(const Tensor& t, const Tensor& tokens, int64_t batch, const char* name) {
  check_value(t.dim() == 1 && t.size(0) == batch, kOp, ": ", name, " must be [", batch, "], got ",
              shape_of(t));
  check_value(t.scalar_type() == statistics_dtype(tokens), kOp, ": ", name,
              " must be float32, or float64 with float64 tokens, got ",
              dtype_name(t.scalar_type()));
}

struct Inputs {
  Tensor tokens, images, t;  // contiguous

  Inputs(const Tensor& given_tokens, const Tensor& given_images, const Tensor& given_t)
      : tokens(torch::stable::contiguous(given_tokens)),
        images(torch::stable::contiguous(given_images)),
        t(torch::stable::contiguous(given_t)) {}
};

PatchVelocityParams checked(const Tensor& tokens, const Tensor& images, const Tensor& t,
                            double floor) {
  check_same_device(tokens, images, kOp, "tokens", "images");
  check_same_device(tokens, t, kOp, "tokens", "t");
  PatchVelocityParams p;
  p.dtype = dtype_of(tokens, kOp, "tokens");
  p.image_dtype = image_dtype(images, tokens, "images");
  p.shape = shape_of_patches(tokens, images, "images");
  check_value(tokens.size(0) == p.shape.batch, kOp,
              ": tokens and images must have the same batch size, got ", tokens.size(0), " and ",
              p.shape.batch);
  check_times(t, tokens, p.shape.batch, "t");
  check_value(floor > 0, kOp, ": floor must be positive, got ", floor);
  p.floor = floor;
  return p;
}

void set_inputs(PatchVelocityParams& p, const Inputs& in, const Tensor& velocity) {
  p.tokens = in.tokens.const_data_ptr();
  p.images = in.images.const_data_ptr();
  p.t = in.t.const_data_ptr();
  p.velocity = velocity.mutable_data_ptr();
}

void launch(const PatchVelocityParams& p, const Tensor& images) {
  if (images.numel() == 0) return;
  run(images, kOp, &cpu::patch_velocity, PMF_CUDA_KERNEL(patch_velocity), p);
}

Tensor patch_velocity(Tensor tokens, Tensor images, Tensor t, double floor) {
  PatchVelocityParams p = checked(tokens, images, t, floor);
  const Inputs in(tokens, images, t);
  const Tensor velocity = torch::stable::new_empty(images, images.sizes());
  set_inputs(p, in, velocity);
  launch(p, images);
  return velocity;
}

std::tuple<Tensor, Tensor> patch_velocity_jvp(Tensor tokens, Tensor images, Tensor t,
                                              Tensor tokens_t, Tensor images_t, Tensor t_t,
                                              double floor) {
  PatchVelocityParams p = checked(tokens, images, t, floor);
  p.tangents = check_tangent(kOp, "tokens_t", tokens_t, "tokens", tokens);
  check_value(check_tangent(kOp, "images_t", images_t, "images", images) == p.tangents, kOp,
              ": tokens_t and images_t must cover the same first samples, got ", tokens_t.size(0),
              " and ", images_t.size(0));
  check_times(t_t, tokens, p.tangents, "t_t");
  const Inputs in(tokens, images, t), in_t(tokens_t, images_t, t_t);
  const Tensor velocity = torch::stable::new_empty(images, images.sizes());
  const Tensor velocity_t = torch::stable::new_empty(images_t, images_t.sizes());
  set_inputs(p, in, velocity);
  p.tokens_t = in_t.tokens.const_data_ptr();
  p.images_t = in_t.images.const_data_ptr();
  p.t_t = in_t.t.const_data_ptr();
  p.velocity_t = velocity_t.mutable_data_ptr();
  launch(p, images);
  return {velocity, velocity_t};
}

// `tokens` only gives the dtype and shape of a token: it may have no samples.
Tensor patch_velocity_backward(Tensor grad, Tensor tokens, Tensor t, double floor) {
  check_same_device(grad, tokens, kOp, "grad", "tokens");
  check_same_device(grad, t, kOp, "grad", "t");
  PatchVelocityBackwardParams p;
  p.dtype = dtype_of(tokens, kOp, "tokens");
  p.image_dtype = image_dtype(grad, tokens, "grad");
  p.shape = shape_of_patches(tokens, grad, "grad");
  check_times(t, tokens, p.shape.batch, "t");
  p.floor = floor;
  const Tensor source = torch::stable::contiguous(grad), times = torch::stable::contiguous(t);
  const Tensor grad_tokens =
      torch::stable::new_empty(tokens, {p.shape.batch, tokens.size(1), tokens.size(2)});
  p.grad = source.const_data_ptr();
  p.t = times.const_data_ptr();
  p.grad_tokens = grad_tokens.mutable_data_ptr();
  if (grad.numel() > 0) {
    run(grad, kOp, &cpu::patch_velocity_backward, PMF_CUDA_KERNEL(patch_velocity_backward), p);
  }
  return grad_tokens;
}

}  // namespace
}  // namespace pmf

PMF_IMPLEMENT(m) {
  m.impl("patch_velocity", TORCH_BOX(&pmf::patch_velocity));
  m.impl("patch_velocity_jvp", TORCH_BOX(&pmf::patch_velocity_jvp));
  m.impl("patch_velocity_backward", TORCH_BOX(&pmf::patch_velocity_backward));
}
