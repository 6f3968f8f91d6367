// torch.ops.pmf.patch_embed*: images to tokens through a bottleneck, with PyTorch's GEMM.
//
//   hidden = W_down patches + b_down        tokens = W_up hidden + b_up + position
// patches [B N, C p p], hidden [B N, R], tokens [B, P + N, D] behind P given prefix tokens. A
// tangent takes the same two products without the biases. Gradients, with Y and T those of tokens
// and their tangent ((.)' transposed, sums over the B N rows of both pairs):
//   dW_up = Y' hidden + T' hidden_t     dh = Y W_up, dh_t = T W_up     db_up = sum Y
//   dW_down = dh' patches + dh_t' patches_t     db_down = sum dh     dposition = sum over B of Y
//   dpatches = dh W_down, and the same for the tangent
//
// Bytes: the image once, the tokens once, hidden (R of D columns) twice. Patches never exist as a
// whole: kPatchBytes of them at a time are copied into a scratch matrix that stays in cache. Tokens
// are written where they belong, behind the prefix. Bound: the GEMM rate.
//
// 16 bits are multiplied in float32 where the processor lacks products for them (products.h),
// copies converting on the way. Everything else is multiplied in its own dtype, summed in float32
// or better.
#include "ops/patch_embed_binding.h"

namespace pmf {
namespace {

using namespace patch_embedding;

// ---- PyTorch's matrix products -----------------------------------------------------------------

void check_status(AOTITorchError status) {
  if (status != AOTI_TORCH_SUCCESS) fail(kOp, ": PyTorch's matrix product failed");
}

// out = left right, plus a bias for every row
void multiply(Tensor out, const Tensor& left, const Tensor& right, const Tensor* bias = nullptr) {
  if (prefers_onednn(left, right)) {
    torch::stable::copy_(out, onednn_product(left, right, bias));
    return;
  }
  if (bias != nullptr) {
    check_status(aoti_torch_cpu_addmm_out(out.get(), bias->get(), left.get(), right.get(), 1, 1));
    return;
  }
  check_status(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
}

Tensor sum_of(const Tensor& a, const Tensor& b) {
  AtenTensorHandle sum = nullptr;
  check_status(aoti_torch_cpu_add_Tensor(a.get(), b.get(), 1, &sum));
  return Tensor(sum);
}

Tensor transposed(const Tensor& m) {
  return strided(m, {m.size(1), m.size(0)}, {m.stride(1), m.stride(0)});
}

// ---- the two products --------------------------------------------------------------------------

// Images `first` to `first + count` as [count, rows, columns, C, p, p]: patches, without a copy.
Tensor patches_of(const Tensor& images, const Sizes& s, int64_t first, int64_t count) {
  const int64_t b = images.stride(0), c = images.stride(1), i = images.stride(2),
                j = images.stride(3);
  return strided(images, {count, s.rows, s.columns, s.channels, s.patch, s.patch},
                 {b, s.patch * i, s.patch * j, c, i, j}, first * b);
}

// Calls body(first row, matrix) with the patches of the whole batch, a chunk of images at a time.
// `fill`: the scratch matrix holds the chunk's patches; otherwise it is uninitialised.
template <class Body>
void for_each_chunk(const Tensor& images, const Sizes& s, bool fill, const Body& body) {
  const int64_t batch = images.size(0), chunk = std::min(s.chunk(), batch);
  if (batch * s.tokens() == 0) return;
  const Tensor scratch = torch::stable::new_empty(
      images, {chunk, s.rows, s.columns, s.channels, s.patch, s.patch}, s.dtype);
  for (int64_t first = 0; first < batch; first += chunk) {
    const int64_t count = std::min(chunk, batch - first);
    Tensor part = samples(scratch, 0, count);
    if (fill) torch::stable::copy_(part, patches_of(images, s, first, count));
    body(first, count, strided(part, {count * s.tokens(), s.features()}, {s.features(), 1}));
  }
}

// W_down as a matrix [R, C p p].
Tensor down_matrix(const Tensor& weight_down, const Sizes& s) {
  const Tensor w = torch::stable::contiguous(as_dtype(weight_down, s.dtype));
  return strided(w, {s.narrow, s.features()}, {s.features(), 1});
}

// hidden [B, N, R], in the dtype of the products.
Tensor down(const Tensor& images, const Tensor& weight_down, const OptionalTensor& bias,
            const Sizes& s) {
  const Tensor hidden =
      torch::stable::new_empty(images, {images.size(0), s.tokens(), s.narrow}, s.dtype);
  const Tensor flat = strided(hidden, {images.size(0) * s.tokens(), s.narrow}, {s.narrow, 1});
  const Tensor weight = transposed(down_matrix(weight_down, s));
  OptionalTensor shift;
  if (bias) shift = torch::stable::contiguous(as_dtype(*bias, s.dtype));
  for_each_chunk(images, s, true, [&](int64_t first, int64_t count, const Tensor& patches) {
    const Tensor out = rows_of(flat, first * s.tokens(), count * s.tokens());
    multiply(out, patches, weight, shift ? &*shift : nullptr);
  });
  return hidden;
}

// Added to the N tokens of every image: b_up + the last N rows of position. Empty without either.
OptionalTensor shift_of(const OptionalTensor& bias, const OptionalTensor& position,
                        const Sizes& s) {
  OptionalTensor shift;
  if (position) {
    const int64_t first = position->size(0) - s.tokens();
    shift = as_dtype(rows_of(*position, first, s.tokens()), s.dtype);
  }
  if (bias) {
    const Tensor b = as_dtype(*bias, s.dtype);
    const Tensor rows = strided(b, {s.tokens(), s.wide}, {0, b.stride(0)});
    shift = shift ? sum_of(*shift, rows) : rows;
  }
  return shift;
}

// tokens [B, P + N, D] from hidden, the prefix in front.
Tensor up(const Tensor& hidden, const Tensor& weight_up, const OptionalTensor& shift,
          const OptionalTensor& prefix, const OptionalTensor& prefix_shift, int64_t P,
          const Sizes& s) {
  const int64_t batch = hidden.size(0), N = s.tokens(), D = s.wide;
  Tensor tokens = torch::stable::new_empty(weight_up, {batch, P + N, D});
  if (batch == 0) return tokens;
  if (P > 0) {
    Tensor front = strided(tokens, {batch, P, D}, {(P + N) * D, D, 1});
    if (!prefix) {
      torch::stable::zero_(front);
    } else if (prefix_shift) {
      torch::stable::copy_(front, sum_of(*prefix, *prefix_shift));
    } else {
      torch::stable::copy_(front, *prefix);
    }
  }
  Tensor back = strided(tokens, {batch, N, D}, {(P + N) * D, D, 1}, P * D);
  const bool convert = tokens.scalar_type() != s.dtype;
  const Tensor out = convert ? torch::stable::new_empty(tokens, {batch, N, D}, s.dtype) : back;
  const Tensor w = as_dtype(weight_up, s.dtype);
  const Tensor rows = strided(hidden, {batch * N, s.narrow}, {s.narrow, 1});
  if (prefers_onednn(rows, w)) {
    const Tensor product = onednn_product(rows, transposed(w));
    const Tensor whole = strided(product, {batch, N, D}, {N * D, D, 1});
    torch::stable::copy_(back, shift ? sum_of(whole, *shift) : whole);
    return tokens;
  }
  const Tensor weight = strided(w, {batch, s.narrow, D}, {0, w.stride(1), w.stride(0)});
  if (shift) {
    const Tensor add = strided(*shift, {batch, N, D}, {0, shift->stride(0), shift->stride(1)});
    check_status(
        aoti_torch_cpu_baddbmm_out(out.get(), add.get(), hidden.get(), weight.get(), 1, 1));
  } else {
    check_status(aoti_torch_cpu_bmm_out(out.get(), hidden.get(), weight.get()));
  }
  if (convert) torch::stable::copy_(back, out);
  return tokens;
}

// ---- forward -----------------------------------------------------------------------------------

Sizes check_forward(const Tensor& images, const Tensor& weight_down,
                    const OptionalTensor& bias_down, const Tensor& weight_up,
                    const OptionalTensor& bias_up, const OptionalTensor& position,
                    const OptionalTensor& prefix) {
  const Sizes s = check_inputs(images, weight_down, weight_up);
  check_bias("bias_down", bias_down, s.narrow, weight_down);
  check_bias("bias_up", bias_up, s.wide, weight_down);
  (void)prefix_rows(position, check_prefix("prefix", prefix, s, weight_down), s, weight_down);
  return s;
}

std::tuple<Tensor, Tensor> patch_embed(Tensor images, Tensor weight_down, OptionalTensor bias_down,
                                       Tensor weight_up, OptionalTensor bias_up,
                                       OptionalTensor position, OptionalTensor prefix) {
  const Sizes s =
      check_forward(images, weight_down, bias_down, weight_up, bias_up, position, prefix);
  if (takes_cuda_kernel(images)) {
    const auto found = forward_on_cuda({images, weight_down, bias_down, weight_up, bias_up,
                                        position, prefix, std::nullopt, std::nullopt},
                                       s);
    return {std::get<0>(found), std::get<2>(found)};
  }
  const int64_t P = prefix ? prefix->size(1) : 0;
  const Tensor hidden = down(images, weight_down, bias_down, s);
  const Tensor tokens = up(hidden, weight_up, shift_of(bias_up, position, s), prefix,
                           prefix_rows(position, P, s, weight_down), P, s);
  return {tokens, as_dtype(hidden, weight_down.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> patch_embed_jvp(Tensor images, Tensor weight_down,
                                                           OptionalTensor bias_down,
                                                           Tensor weight_up, OptionalTensor bias_up,
                                                           OptionalTensor position,
                                                           OptionalTensor prefix, Tensor images_t,
                                                           OptionalTensor prefix_t) {
  const Sizes all =
      check_forward(images, weight_down, bias_down, weight_up, bias_up, position, prefix);
  check_tangent(kOp, "images_t", images_t, "images", images);
  const Sizes s = check_inputs(images_t, weight_down, weight_up);
  const int64_t P = prefix ? prefix->size(1) : 0;
  if (prefix_t) {
    check_value(check_prefix("prefix_t", prefix_t, s, weight_down) == P, kOp,
                ": prefix_t must have the tokens of prefix, ", P, ", got ", shape_of(*prefix_t));
  }
  if (takes_cuda_kernel(images)) {
    return forward_on_cuda(
        {images, weight_down, bias_down, weight_up, bias_up, position, prefix, images_t, prefix_t},
        all);
  }
  const auto [tokens, hidden] =
      patch_embed(images, weight_down, bias_down, weight_up, bias_up, position, prefix);
  const Tensor hidden_t = down(images_t, weight_down, std::nullopt, s);
  const Tensor tokens_t = up(hidden_t, weight_up, std::nullopt, prefix_t, std::nullopt, P, s);
  return {tokens, tokens_t, hidden, as_dtype(hidden_t, weight_down.scalar_type())};
}

// ---- backward ----------------------------------------------------------------------------------

// Adds up the weights' gradients over value and tangent: products of each go side by side into one
// buffer, which a sum in float32 (float64 for float64) reduces at the end.
class Parts {
 public:
  Parts(const Tensor& like, int64_t count, int64_t rows, int64_t columns, ScalarType dtype)
      : buffer_(torch::stable::new_empty(like, {count, rows, columns}, dtype)) {}

  Tensor next() {
    const int64_t size = buffer_.size(1) * buffer_.size(2);
    return strided(buffer_, {buffer_.size(1), buffer_.size(2)}, {buffer_.size(2), 1},
                   used_++ * size);
  }
  Tensor sum(const Tensor& like) {
    const std::vector<int64_t> first{0};
    const Tensor total =
        torch::stable::sum(samples(buffer_, 0, used_), first, false, statistics_dtype(buffer_));
    const Tensor result = torch::stable::new_empty(like, like.sizes());
    Tensor flat = strided(result, {total.size(0), total.size(1)}, {total.size(1), 1});
    torch::stable::copy_(flat, total);
    return result;
  }

 private:
  Tensor buffer_;
  int64_t used_ = 0;
};

struct Gradients {
  const Sizes s;
  const Tensor &weight_down, &weight_up;
  Parts up, down;
  Tensor bias_down, bias_up, position;

  Gradients(const Tensor& images, const Tensor& weight_down, const Tensor& weight_up,
            int64_t tokens, const Sizes& s, int64_t pairs)
      : s(s),
        weight_down(weight_down),
        weight_up(weight_up),
        up(images, pairs, s.wide, s.narrow, s.dtype),
        down(images, pairs * ((s.batch + s.chunk() - 1) / s.chunk()), s.narrow, s.features(),
             s.dtype),
        bias_down(torch::stable::new_zeros(weight_down, {s.narrow})),
        bias_up(torch::stable::new_zeros(weight_down, {s.wide})),
        position(torch::stable::new_zeros(weight_down, {tokens, s.wide})) {}

  // One pair of tokens and images, the value's (with biases) or the tangent's. Prefix tokens take
  // part in the products with Y as rows of zeros in hidden, so that Y needs no copy; they are few.
  // Returns the gradient of the images, if wanted.
  Tensor add(const Tensor& grad_in, const Tensor& images, const Tensor& hidden_in, bool biases,
             bool images_need_grad) {
    const int64_t B = s.batch, T = grad_in.size(1), N = s.tokens(), R = s.narrow, D = s.wide;
    Tensor grad_images =
        images_need_grad ? torch::stable::new_zeros(images, images.sizes()) : no_gradient(images);
    if (B * T * D == 0) return grad_images;
    const Tensor grad = torch::stable::contiguous(as_dtype(grad_in, s.dtype));
    const Tensor rows = strided(grad, {B * T, D}, {D, 1});
    if (biases) add_shift_gradients(grad);

    Tensor hidden = as_dtype(hidden_in, s.dtype);
    if (T > N) {
      Tensor padded = torch::stable::new_zeros(hidden, {B, T, R});
      Tensor back = strided(padded, {B, N, R}, {T * R, R, 1}, (T - N) * R);
      torch::stable::copy_(back, hidden);
      hidden = padded;
    }
    multiply(up.next(), transposed(rows), strided(hidden, {B * T, R}, {R, 1}));

    const Tensor all = torch::stable::new_empty(grad, {B, T, R});
    multiply(strided(all, {B * T, R}, {R, 1}), rows, as_dtype(weight_up, s.dtype));
    const Tensor dh =
        torch::stable::contiguous(strided(all, {B, N, R}, {T * R, R, 1}, (T - N) * R));
    const Tensor flat = strided(dh, {B * N, R}, {R, 1});
    if (biases) {
      const std::vector<int64_t> first{0};
      torch::stable::copy_(bias_down,
                           torch::stable::sum(flat, first, false, statistics_dtype(flat)));
    }
    for_each_chunk(images, s, true, [&](int64_t start, int64_t count, const Tensor& patches) {
      multiply(down.next(), transposed(rows_of(flat, start * N, count * N)), patches);
    });
    if (images_need_grad) {
      const Tensor weight = down_matrix(weight_down, s);
      for_each_chunk(images, s, false, [&](int64_t start, int64_t count, const Tensor& patches) {
        multiply(patches, rows_of(flat, start * N, count * N), weight);
        Tensor target = patches_of(grad_images, s, start, count);
        torch::stable::copy_(
            target, strided(patches, {count, s.rows, s.columns, s.channels, s.patch, s.patch},
                            {N * s.features(), s.columns * s.features(), s.features(),
                             s.patch * s.patch, s.patch, 1}));
      });
    }
    return grad_images;
  }

 private:
  void add_shift_gradients(const Tensor& grad) {
    const std::vector<int64_t> first{0};
    const Tensor sums = torch::stable::sum(grad, first, false, statistics_dtype(grad));  // [T, D]
    torch::stable::copy_(position, sums);
    const int64_t N = s.tokens();
    torch::stable::copy_(bias_up, torch::stable::sum(rows_of(sums, sums.size(0) - N, N), first));
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> patch_embed_backward(
    Tensor grad, Tensor images, Tensor weight_down, Tensor weight_up, Tensor hidden,
    bool images_need_grad) {
  const Sizes s = check_inputs(images, weight_down, weight_up);
  check_gradient("grad", grad, "hidden", hidden, weight_down, s);
  if (takes_cuda_kernel(images)) {
    auto [grad_images, none, down, bias_down, up, bias_up, position] =
        backward_on_cuda({grad, std::nullopt, images, std::nullopt, weight_down, weight_up, hidden,
                          std::nullopt, images_need_grad},
                         s);
    return {grad_images, down, bias_down, up, bias_up, position};
  }
  Gradients g(images, weight_down, weight_up, grad.size(1), s, 1);
  const Tensor grad_images = g.add(grad, images, hidden, true, images_need_grad);
  return {grad_images, g.down.sum(weight_down), g.bias_down, g.up.sum(weight_up), g.bias_up,
          g.position};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> patch_embed_jvp_backward(
    OptionalTensor grad, Tensor grad_t, Tensor images, Tensor images_t, Tensor weight_down,
    Tensor weight_up, Tensor hidden, Tensor hidden_t, bool images_need_grad) {
  const Sizes s = check_inputs(images, weight_down, weight_up);
  check_like(kOp, "images_t", images_t, "images", images);
  check_gradient("grad_t", grad_t, "hidden_t", hidden_t, weight_down, s);
  if (grad) check_gradient("grad", *grad, "hidden", hidden, weight_down, s);
  if (takes_cuda_kernel(images)) {
    return backward_on_cuda({grad, grad_t, images, images_t, weight_down, weight_up, hidden,
                             hidden_t, images_need_grad},
                            s);
  }
  Gradients g(images, weight_down, weight_up, grad_t.size(1), s, 2);
  const Tensor grad_images = grad ? g.add(*grad, images, hidden, true, images_need_grad)
                             : images_need_grad ? torch::stable::new_zeros(images, images.sizes())
                                                : no_gradient(images);
  const Tensor grad_images_t = g.add(grad_t, images_t, hidden_t, false, images_need_grad);
  return {grad_images, grad_images_t, g.down.sum(weight_down), g.bias_down, g.up.sum(weight_up),
          g.bias_up,   g.position};
}

}  // namespace
}  // namespace pmf

PMF_IMPLEMENT(m) {
  m.impl("patch_embed", TORCH_BOX(&pmf::patch_embed));
  m.impl("patch_embed_jvp", TORCH_BOX(&pmf::patch_embed_jvp));
  m.impl("patch_embed_backward", TORCH_BOX(&pmf::patch_embed_backward));
  m.impl("patch_embed_jvp_backward", TORCH_BOX(&pmf::patch_embed_jvp_backward));
}
