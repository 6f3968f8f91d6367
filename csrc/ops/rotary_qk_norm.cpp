// torch.ops.pmf.rotary_qk_norm*: validate, allocate, launch. The mathematics is in
// pmf/rotary_qk_norm.h.
#include "pmf/rotary_qk_norm.h"

#include "cuda/rows/rows_launchers.h"
#include "ops/row_binding.h"
#include "ops/views.h"

namespace pmf {
namespace {

constexpr const char* kOp = "rotary_qk_norm";

void check_side(const char* name, const Tensor& x, const char* weight_name, const Tensor& weight,
                const Tensor& query) {
  check_value(x.dim() == 4 && x.size(0) == query.size(0) && x.size(2) == query.size(2) &&
                  x.size(3) == query.size(3),
              kOp, ": query must be [B, H, N, D] and key [B, Hk, N, D], got ", shape_of(query),
              " and ", shape_of(x));
  check_kind(kOp, name, x, "query", query);
  check_vector(kOp, weight_name, weight, name, x);
}

// What query and key have in common in a call, and the tensors that keep it alive.
struct Frame {
  RotaryShape shape;
  Tensor cos, sin;

  Frame(const Tensor& query, const Tensor& key, const Tensor& query_weight,
        const Tensor& key_weight, const Tensor& cos_in, const Tensor& sin_in, double eps)
      : shape(checked(query, key, query_weight, key_weight, cos_in, sin_in, eps)),
        cos(table(cos_in, query)),
        sin(table(sin_in, query)) {
    shape.cos = cos.const_data_ptr();
    shape.sin = sin.const_data_ptr();
  }

 private:
  static RotaryShape checked(const Tensor& query, const Tensor& key, const Tensor& query_weight,
                             const Tensor& key_weight, const Tensor& cos, const Tensor& sin,
                             double eps) {
    RotaryShape s;
    s.dtype = dtype_of(query, kOp, "query");
    check_side("query", query, "query_weight", query_weight, query);
    check_side("key", key, "key_weight", key_weight, query);
    s.batch = query.size(0);
    s.tokens = query.size(2);
    s.width = query.size(3);
    s.eps = eps;
    check_value(s.width % 2 == 0, kOp, ": the width D of a head must be even, got ", s.width);
    check_value(cos.dim() == 2 && sizes_of(cos) == sizes_of(sin) && cos.size(1) == s.width / 2 &&
                    cos.size(0) <= s.tokens,
                kOp, ": cos and sin must be [P, ", s.width / 2, "] with P <= ", s.tokens, ", got ",
                shape_of(cos), " and ", shape_of(sin));
    check_same_device(query, cos, kOp, "query", "cos");
    check_same_device(query, sin, kOp, "query", "sin");
    s.rotated = cos.size(0);
    return s;
  }
  static Tensor table(const Tensor& t, const Tensor& query) {
    return torch::stable::contiguous(torch::stable::to(t, statistics_dtype(query)));
  }
};

Tensor tangent_of_weight(const Tensor& weight, const char* name, const OptionalTensor& weight_t) {
  if (!weight_t) return zeros_vector(weight, weight.size(0));
  check_vector(kOp, name, *weight_t, "the weight", weight);
  return readable(*weight_t);
}

void launch(const RotaryQkNormParams& p, const Tensor& query) {
  if (p.shape.batch * p.shape.tokens * p.shape.width == 0) return;
  run(query, kOp, &cpu::rotary_qk_norm, PMF_CUDA_KERNEL(rotary_qk_norm), p);
}

// The queries or the keys of a call; every tensor is readable.
RotaryHeads heads(const Tensor& x, const Tensor& weight, const Tensor& y) {
  RotaryHeads side;
  side.heads = x.size(1);
  side.x = const_view4(x);
  side.weight = weight.const_data_ptr();
  side.y = view4(y);
  return side;
}

RotaryHeads heads_with_tangents(const Tensor& x, const Tensor& weight, const Tensor& y,
                                const Tensor& x_t, const Tensor& weight_t, const Tensor& y_t) {
  RotaryHeads side = heads(x, weight, y);
  side.x_t = const_view4(x_t);
  side.weight_t = weight_t.const_data_ptr();
  side.y_t = view4(y_t);
  return side;
}

std::tuple<Tensor, Tensor> rotary_qk_norm(Tensor query, Tensor key, Tensor query_weight,
                                          Tensor key_weight, Tensor cos, Tensor sin, double eps) {
  const Frame frame(query, key, query_weight, key_weight, cos, sin, eps);
  const Tensor q = readable(query), k = readable(key);
  const Tensor qw = readable(query_weight), kw = readable(key_weight);
  Output q_out(query), k_out(key);
  RotaryQkNormParams p;
  p.shape = frame.shape;
  p.sides[0] = heads(q, qw, q_out.buffer());
  p.sides[1] = heads(k, kw, k_out.buffer());
  launch(p, query);
  return {q_out.result(), k_out.result()};
}

// Samples without a tangent go through the plain kernel.
std::tuple<Tensor, Tensor, Tensor, Tensor> rotary_qk_norm_jvp(
    Tensor query, Tensor key, Tensor query_weight, Tensor key_weight, Tensor cos, Tensor sin,
    Tensor query_t, Tensor key_t, OptionalTensor query_weight_t, OptionalTensor key_weight_t,
    double eps) {
  const Frame frame(query, key, query_weight, key_weight, cos, sin, eps);
  const int64_t n = check_tangent(kOp, "query_t", query_t, "query", query);
  check_value(check_tangent(kOp, "key_t", key_t, "key", key) == n, kOp,
              ": query_t and key_t must have the same number of samples, got ", n, " and ",
              key_t.size(0));
  const Tensor q = readable(query), k = readable(key);
  const Tensor q_t = readable(query_t), k_t = readable(key_t);
  const Tensor qw = readable(query_weight), kw = readable(key_weight);
  const Tensor qw_t = tangent_of_weight(query_weight, "query_weight_t", query_weight_t);
  const Tensor kw_t = tangent_of_weight(key_weight, "key_weight_t", key_weight_t);
  Output q_out(query), k_out(key), q_out_t(query_t), k_out_t(key_t);
  RotaryQkNormParams p;
  p.shape = frame.shape;
  p.shape.batch = n;
  p.sides[0] = heads_with_tangents(q, qw, q_out.buffer(), q_t, qw_t, q_out_t.buffer());
  p.sides[1] = heads_with_tangents(k, kw, k_out.buffer(), k_t, kw_t, k_out_t.buffer());
  launch(p, query);
  if (const int64_t rest = q.size(0) - n; rest > 0) {
    p.shape.batch = rest;
    p.sides[0] = heads(samples(q, n, rest), qw, samples(q_out.buffer(), n, rest));
    p.sides[1] = heads(samples(k, n, rest), kw, samples(k_out.buffer(), n, rest));
    launch(p, query);
  }
  return {q_out.result(), k_out.result(), q_out_t.result(), k_out_t.result()};
}

// The queries or the keys of a backward: the inputs, kept alive, and the gradients to be written.
struct BackwardSide {
  Tensor x, weight, grad;
  bool has_grad;
  OptionalTensor x_t, weight_t, grad_t;
  Output grad_x;
  Tensor grad_weight;
  std::optional<Output> grad_x_t;
  OptionalTensor grad_weight_t;

  BackwardSide(const Tensor& x_in, const Tensor& weight_in, const OptionalTensor& grad_in)
      : x(readable(x_in)),
        weight(readable(weight_in)),
        grad(readable(or_zeros(grad_in, x_in))),
        has_grad(grad_in.has_value()),
        grad_x(x_in),
        grad_weight(gradient_of(weight_in, x_in)) {}

  void through_tangents(const Tensor& x_t_in, const Tensor& weight_t_in, const Tensor& grad_t_in) {
    x_t = readable(x_t_in);
    weight_t = weight_t_in;
    grad_t = readable(grad_t_in);
    grad_x_t.emplace(x_t_in);
    grad_weight_t = gradient_of(weight, x);
  }

  RotaryHeadsBackward heads() const {
    RotaryHeadsBackward side;
    side.heads = x.size(1);
    side.x = const_view4(x);
    side.weight = weight.const_data_ptr();
    if (has_grad) {
      side.grad = const_view4(grad);
    } else {  // a single row of zeros, repeated
      side.grad.data = grad.const_data_ptr();
    }
    side.grad_x = view4(grad_x.buffer());
    side.grad_weight = grad_weight.mutable_data_ptr();
    if (x_t) {
      side.x_t = const_view4(*x_t);
      side.weight_t = weight_t->const_data_ptr();
      side.grad_t = const_view4(*grad_t);
      side.grad_x_t = view4(grad_x_t->buffer());
      side.grad_weight_t = grad_weight_t->mutable_data_ptr();
    }
    return side;
  }
};

void launch_backward(const Frame& frame, const BackwardSide& query, const BackwardSide& key) {
  RotaryQkNormBackwardParams p;
  p.shape = frame.shape;
  p.sides[0] = query.heads();
  p.sides[1] = key.heads();
  if (p.shape.batch * p.shape.tokens * p.shape.width == 0) return;
  const Workspace workspace(query.x, rotary_workspace_bytes(p, takes_cuda_kernel(query.x)));
  p.workspace = workspace.data();
  run(query.x, kOp, &cpu::rotary_qk_norm_backward, PMF_CUDA_KERNEL(rotary_qk_norm_backward), p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rotary_qk_norm_backward(Tensor grad_query,
                                                                   Tensor grad_key, Tensor query,
                                                                   Tensor key, Tensor query_weight,
                                                                   Tensor key_weight, Tensor cos,
                                                                   Tensor sin, double eps) {
  const Frame frame(query, key, query_weight, key_weight, cos, sin, eps);
  check_like(kOp, "grad_query", grad_query, "query", query);
  check_like(kOp, "grad_key", grad_key, "key", key);
  BackwardSide q(query, query_weight, grad_query), k(key, key_weight, grad_key);
  launch_backward(frame, q, k);
  return {q.grad_x.result(), k.grad_x.result(), q.grad_weight, k.grad_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
rotary_qk_norm_jvp_backward(OptionalTensor grad_query, OptionalTensor grad_key, Tensor grad_query_t,
                            Tensor grad_key_t, Tensor query, Tensor key, Tensor query_weight,
                            Tensor key_weight, Tensor cos, Tensor sin, Tensor query_t, Tensor key_t,
                            OptionalTensor query_weight_t, OptionalTensor key_weight_t,
                            double eps) {
  const Frame frame(query, key, query_weight, key_weight, cos, sin, eps);
  check_like(kOp, "query_t", query_t, "query", query);
  check_like(kOp, "key_t", key_t, "key", key);
  check_like(kOp, "grad_query_t", grad_query_t, "query", query);
  check_like(kOp, "grad_key_t", grad_key_t, "key", key);
  check_like(kOp, "grad_query", grad_query, "query", query);
  check_like(kOp, "grad_key", grad_key, "key", key);
  BackwardSide q(query, query_weight, grad_query), k(key, key_weight, grad_key);
  q.through_tangents(query_t, tangent_of_weight(query_weight, "query_weight_t", query_weight_t),
                     grad_query_t);
  k.through_tangents(key_t, tangent_of_weight(key_weight, "key_weight_t", key_weight_t),
                     grad_key_t);
  launch_backward(frame, q, k);
  return {q.grad_x.result(),
          k.grad_x.result(),
          q.grad_weight,
          k.grad_weight,
          q.grad_x_t->result(),
          k.grad_x_t->result(),
          query_weight_t ? *q.grad_weight_t : no_gradient(query_weight),
          key_weight_t ? *k.grad_weight_t : no_gradient(key_weight)};
}

}  // namespace
}  // namespace pmf

PMF_IMPLEMENT(m) {
  m.impl("rotary_qk_norm", TORCH_BOX(&pmf::rotary_qk_norm));
  m.impl("rotary_qk_norm_jvp", TORCH_BOX(&pmf::rotary_qk_norm_jvp));
  m.impl("rotary_qk_norm_backward", TORCH_BOX(&pmf::rotary_qk_norm_backward));
  m.impl("rotary_qk_norm_jvp_backward", TORCH_BOX(&pmf::rotary_qk_norm_jvp_backward));
}
