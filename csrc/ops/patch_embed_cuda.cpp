// torch.ops.pmf.patch_embed* on CUDA: tensors to the parameters of pmf/patch_embed.h.
#include "pmf/patch_embed.h"

#include "cuda/patch_embed/patch_embed_launchers.h"
#include "ops/patch_embed_binding.h"

namespace pmf::patch_embedding {
namespace {

constexpr int64_t kMaxIndex = int64_t{1} << 31;  // of rows and columns, in the kernels

PatchSizes sizes_for(const Tensor& images, const Tensor& weight_down, const Sizes& s,
                     int64_t prefix) {
  check_value(s.batch * s.tokens() < kMaxIndex && s.features() < kMaxIndex, kOp,
              ": at most 2^31 patches in a call, got ", s.batch * s.tokens(), "; split the batch");
  PatchSizes sizes;
  sizes.dtype = dtype_of(weight_down, kOp, "weight_down");
  sizes.image_dtype = dtype_of(images, kOp, "images");
  sizes.batch = s.batch;
  sizes.channels = s.channels;
  sizes.rows = s.rows;
  sizes.columns = s.columns;
  sizes.patch = s.patch;
  sizes.narrow = s.narrow;
  sizes.wide = s.wide;
  sizes.prefix = prefix;
  return sizes;
}

ConstView4 view_of(const Tensor& t) {
  ConstView4 view;
  view.data = t.const_data_ptr();
  for (int d = 0; d < 4; ++d) view.stride[d] = t.stride(d);
  return view;
}

View4 writable_view_of(const Tensor& t) {
  View4 view;
  view.data = t.mutable_data_ptr();
  for (int d = 0; d < 4; ++d) view.stride[d] = t.stride(d);
  return view;
}

// Contiguous copies, alive as long as this object.
class Packed {
 public:
  const void* operator()(const Tensor& t) {
    kept_.push_back(torch::stable::contiguous(t));
    return kept_.back().const_data_ptr();
  }
  const void* operator()(const OptionalTensor& t) { return t ? (*this)(*t) : nullptr; }

 private:
  std::vector<Tensor> kept_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_on_cuda(const Forward& in, const Sizes& s) {
  const int64_t P = in.prefix ? in.prefix->size(1) : 0, N = s.tokens();
  const int64_t count = in.images_t ? in.images_t->size(0) : 0;
  PatchEmbedParams p;
  p.sizes = sizes_for(in.images, in.weight_down, s, P);
  p.sizes.tangents = count;
  const Tensor tokens = torch::stable::new_empty(in.weight_up, {s.batch, P + N, s.wide});
  const Tensor tokens_t = torch::stable::new_empty(in.weight_up, {count, P + N, s.wide});
  const Tensor hidden = torch::stable::new_empty(in.weight_down, {s.batch, N, s.narrow});
  const Tensor hidden_t = torch::stable::new_empty(in.weight_down, {count, N, s.narrow});
  Packed packed;
  p.images[0] = view_of(in.images);
  if (in.images_t) p.images[1] = view_of(*in.images_t);
  p.weight_down = packed(in.weight_down);
  p.bias_down = packed(in.bias_down);
  p.weight_up = packed(in.weight_up);
  p.bias_up = packed(in.bias_up);
  if (in.position) p.position = packed(rows_of(*in.position, in.position->size(0) - N, N));
  p.prefix_position = packed(prefix_rows(in.position, P, s, in.weight_down));
  p.prefix[0] = packed(in.prefix);
  p.prefix[1] = packed(in.prefix_t);
  p.hidden[0] = hidden.mutable_data_ptr();
  p.hidden[1] = hidden_t.mutable_data_ptr();
  p.tokens[0] = tokens.mutable_data_ptr();
  p.tokens[1] = tokens_t.mutable_data_ptr();
  if (tokens.numel() > 0) run_on_cuda(in.images, kOp, PMF_CUDA_KERNEL(patch_embed), p);
  return {tokens, tokens_t, hidden, hidden_t};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_on_cuda(
    const Backward& in, const Sizes& s) {
  const Tensor& any_grad = in.grad ? *in.grad : *in.grad_t;
  PatchEmbedBackwardParams p;
  p.sizes = sizes_for(in.images, in.weight_down, s, any_grad.size(1) - s.tokens());
  p.sizes.tangents = in.grad_t ? s.batch : 0;
  const bool empty = any_grad.numel() == 0 || s.tokens() == 0;
  // A gradient that no kernel writes is zero.
  const auto gradient_like = [&](const Tensor& like, std::vector<int64_t> shape, bool written) {
    return written && !empty ? torch::stable::new_empty(like, shape)
                             : torch::stable::new_zeros(like, shape);
  };
  const auto gradient = [&](std::vector<int64_t> shape, bool written) {
    return gradient_like(in.weight_down, shape, written);
  };
  const bool value = in.grad.has_value();
  const auto of_images = [&](const Tensor& images, bool written) {
    return in.images_need_grad ? gradient_like(images, sizes_of(images), written)
                               : no_gradient(images);
  };
  const Tensor grad_images = of_images(in.images, value);
  const Tensor grad_images_t = in.images_t ? of_images(*in.images_t, true) : no_gradient(in.images);
  const Tensor down = gradient(sizes_of(in.weight_down), true);
  const Tensor bias_down = gradient({s.narrow}, value);
  const Tensor up = gradient(sizes_of(in.weight_up), true);
  const Tensor bias_up = gradient({s.wide}, value);
  const Tensor position = gradient({any_grad.size(1), s.wide}, value);
  if (!empty) {
    Packed packed;
    p.images[0] = view_of(in.images);
    if (in.images_t) p.images[1] = view_of(*in.images_t);
    p.weight_down = packed(in.weight_down);
    p.weight_up = packed(in.weight_up);
    p.hidden[0] = packed(in.hidden);
    p.hidden[1] = packed(in.hidden_t);
    p.grad[0] = packed(in.grad);
    p.grad[1] = packed(in.grad_t);
    if (in.images_need_grad) {
      p.grad_images[0] = writable_view_of(grad_images);
      if (in.images_t) p.grad_images[1] = writable_view_of(grad_images_t);
    }
    p.grad_weight_down = down.mutable_data_ptr();
    p.grad_bias_down = bias_down.mutable_data_ptr();
    p.grad_weight_up = up.mutable_data_ptr();
    p.grad_bias_up = bias_up.mutable_data_ptr();
    p.grad_position = position.mutable_data_ptr();
    const Workspace workspace(in.images, PatchWorkspace(p).total());
    p.workspace = workspace.data();
    run_on_cuda(in.images, kOp, PMF_CUDA_KERNEL(patch_embed_backward), p);
  }
  return {grad_images, grad_images_t, down, bias_down, up, bias_up, position};
}

}  // namespace pmf::patch_embedding
