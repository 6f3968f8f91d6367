// torch.ops.pmf.patch_embed*: checks and views for its two files. The CPU path is in
// patch_embed.cpp, the calls to the CUDA kernels in patch_embed_cuda.cpp.
#pragma once

#include <algorithm>

#include "ops/products.h"
#include "ops/row_binding.h"

namespace pmf::patch_embedding {

constexpr const char* kOp = "patch_embed";
constexpr int64_t kPatchBytes = int64_t{4} << 20;

// A view of t's memory from element `offset` on.
inline Tensor strided(const Tensor& t, std::vector<int64_t> sizes, std::vector<int64_t> strides,
                      int64_t offset = 0) {
  AtenTensorHandle view = nullptr;
  const int64_t dims = static_cast<int64_t>(sizes.size());
  if (aoti_torch__reinterpret_tensor(t.get(), dims, sizes.data(), strides.data(), offset, &view)) {
    fail(kOp, ": a view could not be made");
  }
  return Tensor(view);
}

inline Tensor rows_of(const Tensor& m, int64_t begin, int64_t count) {
  return strided(m, {count, m.size(1)}, {m.stride(0), m.stride(1)}, begin * m.stride(0));
}

// ---- shapes and checks -------------------------------------------------------------------------

struct Sizes {
  int64_t batch, channels, rows, columns, patch;  // rows x columns patches an image
  int64_t narrow, wide;                           // R, D
  ScalarType dtype;                               // the dtype of the products

  int64_t tokens() const { return rows * columns; }
  int64_t features() const { return channels * patch * patch; }
  // Images whose patches fit the scratch matrix.
  int64_t chunk() const {
    const int64_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
    return std::max<int64_t>(1, kPatchBytes / std::max<int64_t>(1, tokens() * features() * bytes));
  }
};

// Everything has the dtype of the weights; images may be float32 with 16-bit weights.
inline Sizes check_inputs(const Tensor& images, const Tensor& weight_down,
                          const Tensor& weight_up) {
  const bool narrow = dtype_bytes(dtype_of(weight_down, kOp, "weight_down")) == 2;
  check_value(images.dim() == 4, kOp, ": images must be [B, C, H, W], got ", shape_of(images));
  check_same_device(images, weight_down, kOp, "images", "weight_down");
  check_value(images.scalar_type() == weight_down.scalar_type() ||
                  (narrow && images.scalar_type() == ScalarType::Float),
              kOp, ": images must have the dtype of weight_down, or float32 beside 16 bits, got ",
              dtype_name(images.scalar_type()), " and ", dtype_name(weight_down.scalar_type()));
  check_kind(kOp, "weight_up", weight_up, "weight_down", weight_down);
  check_value(weight_down.dim() == 4 && weight_down.size(1) == images.size(1) &&
                  weight_down.size(2) == weight_down.size(3) && weight_down.size(2) > 0,
              kOp, ": weight_down must be [R, ", images.size(1), ", p, p] for images ",
              shape_of(images), ", got ", shape_of(weight_down));
  const int64_t patch = weight_down.size(2);
  check_value(images.size(2) % patch == 0 && images.size(3) % patch == 0, kOp, ": images ",
              shape_of(images), " do not divide into patches of ", patch, " x ", patch);
  check_value(weight_up.dim() == 2 && weight_up.size(1) == weight_down.size(0), kOp,
              ": weight_up must be [D, ", weight_down.size(0), "], got ", shape_of(weight_up));
  const ScalarType dtype = weight_down.scalar_type();
  return {images.size(0), images.size(1),      images.size(2) / patch, images.size(3) / patch,
          patch,          weight_down.size(0), weight_up.size(0),      product_dtype(dtype)};
}

inline void check_bias(const char* name, const OptionalTensor& bias, int64_t size,
                       const Tensor& weight_down) {
  if (!bias) return;
  check_kind(kOp, name, *bias, "weight_down", weight_down);
  check_value(bias->dim() == 1 && bias->size(0) == size, kOp, ": ", name, " must be [", size,
              "], got ", shape_of(*bias));
}

// P, the number of prefix tokens.
inline int64_t check_prefix(const char* name, const OptionalTensor& prefix, const Sizes& s,
                            const Tensor& weight_down) {
  if (!prefix) return 0;
  check_kind(kOp, name, *prefix, "weight_down", weight_down);
  check_value(prefix->dim() == 3 && prefix->size(0) == s.batch && prefix->size(2) == s.wide, kOp,
              ": ", name, " must be [", s.batch, ", P, ", s.wide, "], got ", shape_of(*prefix));
  return prefix->size(1);
}

// The rows of `position` that belong to the prefix, if it has them; checks its shape.
inline OptionalTensor prefix_rows(const OptionalTensor& position, int64_t P, const Sizes& s,
                                  const Tensor& weight_down) {
  if (!position) return std::nullopt;
  check_kind(kOp, "position", *position, "weight_down", weight_down);
  const int64_t N = s.tokens();
  check_value(position->dim() == 2 && position->size(1) == s.wide &&
                  (position->size(0) == N || position->size(0) == P + N),
              kOp, ": position must be [", N, ", ", s.wide, "] or, with ", P, " prefix tokens, [",
              P + N, ", ", s.wide, "], got ", shape_of(*position));
  if (P == 0 || position->size(0) == N) return std::nullopt;
  return rows_of(*position, 0, P);
}

inline void check_gradient(const char* name, const Tensor& grad, const char* hidden_name,
                           const Tensor& hidden, const Tensor& weight_down, const Sizes& s) {
  check_kind(kOp, name, grad, "weight_down", weight_down);
  check_kind(kOp, hidden_name, hidden, "weight_down", weight_down);
  check_value(grad.dim() == 3 && grad.size(0) == s.batch && grad.size(1) >= s.tokens() &&
                  grad.size(2) == s.wide,
              kOp, ": ", name, " must be [", s.batch, ", P + ", s.tokens(), ", ", s.wide, "], got ",
              shape_of(grad));
  check_value(hidden.is_contiguous() && hidden.numel() == s.batch * s.tokens() * s.narrow, kOp,
              ": ", hidden_name, " must be the forward's, got ", shape_of(hidden));
}

// ---- the CUDA kernels --------------------------------------------------------------------------

struct Forward {
  const Tensor &images, &weight_down;
  const OptionalTensor& bias_down;
  const Tensor& weight_up;
  const OptionalTensor &bias_up, &position, &prefix;
  const OptionalTensor &images_t, &prefix_t;  // absent: value only
};

// tokens, tokens_t, hidden, hidden_t; those of an absent tangent are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_on_cuda(const Forward& in, const Sizes& s);

struct Backward {
  const OptionalTensor &grad, &grad_t;  // one may be absent
  const Tensor& images;
  const OptionalTensor& images_t;
  const Tensor &weight_down, &weight_up, &hidden;
  const OptionalTensor& hidden_t;
  bool images_need_grad;
};

// Gradients of images, images_t, weight_down, bias_down, weight_up, bias_up and position.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_on_cuda(
    const Backward& in, const Sizes& s);

}  // namespace pmf::patch_embedding
