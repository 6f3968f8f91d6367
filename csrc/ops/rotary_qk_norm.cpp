// torch.ops.pmf.rotary_qk_norm*: validate, allocate, launch. The mathematics is in
// pmf/rotary_qk_norm.h.
#include "pmf/rotary_qk_norm.h"

#include "ops/row_binding.h"

namespace pmf {
namespace {

constexpr const char* kOp = "rotary_qk_norm";

ConstView4 view_of(const Tensor& t) {
  ConstView4 view;
  view.data = t.const_data_ptr();
  for (int d = 0; d < 4; ++d) view.stride[d] = t.stride(d);
  return view;
}

View4 view_of(const Output& output) {
  const Tensor& t = output.buffer();
  View4 view;
  view.data = t.mutable_data_ptr();
  for (int d = 0; d < 4; ++d) view.stride[d] = t.stride(d);
  return view;
}

View4 first_samples(View4 view, int64_t skip, DType dtype) {
  view.data = static_cast<char*>(view.data) + skip * view.stride[0] * dtype_bytes(dtype);
  return view;
}

void check_side(const char* name, const Tensor& x, const char* weight_name, const Tensor& weight,
                const Tensor& query) {
  check_value(x.dim() == 4 && x.size(0) == query.size(0) && x.size(2) == query.size(2) &&
                  x.size(3) == query.size(3),
              kOp, ": query must be [B, H, N, D] and key [B, Hk, N, D], got ", shape_of(query),
              " and ", shape_of(x));
  check_kind(kOp, name, x, "query", query);
  check_vector(kOp, weight_name, weight, name, x);
}

// Everything of a call that query and key share, and the tensors that keep it alive.
struct Frame {
  RotaryShape shape;
  Tensor cos, sin;
  Workspace tables;

  Frame(const Tensor& query, const Tensor& key, const Tensor& query_weight,
        const Tensor& key_weight, const Tensor& cos_in, const Tensor& sin_in, double eps)
      : shape(checked(query, key, query_weight, key_weight, cos_in, sin_in, eps)),
        cos(table(cos_in, query)),
        sin(table(sin_in, query)),
        tables(query, rotary_table_bytes(shape)) {
    shape.cos = cos.const_data_ptr();
    shape.sin = sin.const_data_ptr();
    shape.tables = tables.data();
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

void launch_backward(RotaryQkNormBackwardParams& p, const Tensor& query) {
  if (p.shape.batch * p.shape.tokens * p.shape.width == 0) return;
  const Workspace workspace(query, rotary_workspace_bytes(p, takes_cuda_kernel(query)));
  p.workspace = workspace.data();
  run(query, kOp, &cpu::rotary_qk_norm_backward, PMF_CUDA_KERNEL(rotary_qk_norm_backward), p);
}

std::tuple<Tensor, Tensor> rotary_qk_norm(Tensor query, Tensor key, Tensor query_weight,
                                          Tensor key_weight, Tensor cos, Tensor sin, double eps) {
  const Frame frame(query, key, query_weight, key_weight, cos, sin, eps);
  const Tensor q = readable(query), k = readable(key);
  const Tensor qw = readable(query_weight), kw = readable(key_weight);
  Output q_out(query), k_out(key);
  RotaryQkNormParams p;
  p.shape = frame.shape;
  p.sides[0] = {q.size(1), view_of(q), {}, qw.const_data_ptr(), nullptr, view_of(q_out), {}};
  p.sides[1] = {k.size(1), view_of(k), {}, kw.const_data_ptr(), nullptr, view_of(k_out), {}};
  launch(p, query);
  return {q_out.result(), k_out.result()};
}

// The samples past the last tangent take the plain kernel.
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
  p.sides[0] = {
      q.size(1),      view_of(q),      view_of(q_t), qw.const_data_ptr(), qw_t.const_data_ptr(),
      view_of(q_out), view_of(q_out_t)};
  p.sides[1] = {
      k.size(1),      view_of(k),      view_of(k_t), kw.const_data_ptr(), kw_t.const_data_ptr(),
      view_of(k_out), view_of(k_out_t)};
  launch(p, query);
  if (const int64_t rest = q.size(0) - n; rest > 0) {
    const DType dtype = p.shape.dtype;
    p.shape.batch = rest;
    const Tensor q_rest = samples(q, n, rest), k_rest = samples(k, n, rest);
    p.sides[0] = {q.size(1), view_of(q_rest),
                  {},        qw.const_data_ptr(),
                  nullptr,   first_samples(view_of(q_out), n, dtype),
                  {}};
    p.sides[1] = {k.size(1), view_of(k_rest),
                  {},        kw.const_data_ptr(),
                  nullptr,   first_samples(view_of(k_out), n, dtype),
                  {}};
    launch(p, query);
  }
  return {q_out.result(), k_out.result(), q_out_t.result(), k_out_t.result()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rotary_qk_norm_backward(Tensor grad_query,
                                                                   Tensor grad_key, Tensor query,
                                                                   Tensor key, Tensor query_weight,
                                                                   Tensor key_weight, Tensor cos,
                                                                   Tensor sin, double eps) {
  const Frame frame(query, key, query_weight, key_weight, cos, sin, eps);
  check_like(kOp, "grad_query", grad_query, "query", query);
  check_like(kOp, "grad_key", grad_key, "key", key);
  const Tensor q = readable(query), k = readable(key);
  const Tensor gq = readable(grad_query), gk = readable(grad_key);
  const Tensor qw = readable(query_weight), kw = readable(key_weight);
  Output dq(query), dk(key);
  const Tensor dqw = gradient_of(query_weight, query);
  const Tensor dkw = gradient_of(key_weight, key);
  RotaryQkNormBackwardParams p;
  p.shape = frame.shape;
  p.sides[0] = {q.size(1), view_of(gq),
                {},        view_of(q),
                {},        qw.const_data_ptr(),
                nullptr,   view_of(dq),
                {},        dqw.mutable_data_ptr(),
                nullptr};
  p.sides[1] = {k.size(1), view_of(gk),
                {},        view_of(k),
                {},        kw.const_data_ptr(),
                nullptr,   view_of(dk),
                {},        dkw.mutable_data_ptr(),
                nullptr};
  launch_backward(p, query);
  return {dq.result(), dk.result(), dqw, dkw};
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
  if (grad_query) check_like(kOp, "grad_query", *grad_query, "query", query);
  if (grad_key) check_like(kOp, "grad_key", *grad_key, "key", key);
  const Tensor q = readable(query), k = readable(key);
  const Tensor q_t = readable(query_t), k_t = readable(key_t);
  const Tensor gq_t = readable(grad_query_t), gk_t = readable(grad_key_t);
  const Tensor qw = readable(query_weight), kw = readable(key_weight);
  const Tensor qw_t = tangent_of_weight(query_weight, "query_weight_t", query_weight_t);
  const Tensor kw_t = tangent_of_weight(key_weight, "key_weight_t", key_weight_t);
  Output dq(query), dk(key), dq_t(query_t), dk_t(key_t);
  const Tensor dqw = gradient_of(query_weight, query);
  const Tensor dkw = gradient_of(key_weight, key);
  const Tensor dqw_t = gradient_of(query_weight, query);
  const Tensor dkw_t = gradient_of(key_weight, key);
  // An absent gradient reads as zero: one row of zeros, repeated.
  const Tensor zeros = zeros_vector(query, query.size(3));
  ConstView4 no_grad;
  no_grad.data = zeros.const_data_ptr();
  const Tensor gq = grad_query ? readable(*grad_query) : zeros;
  const Tensor gk = grad_key ? readable(*grad_key) : zeros;
  RotaryQkNormBackwardParams p;
  p.shape = frame.shape;
  p.sides[0] = {q.size(1),
                grad_query ? view_of(gq) : no_grad,
                view_of(gq_t),
                view_of(q),
                view_of(q_t),
                qw.const_data_ptr(),
                qw_t.const_data_ptr(),
                view_of(dq),
                view_of(dq_t),
                dqw.mutable_data_ptr(),
                dqw_t.mutable_data_ptr()};
  p.sides[1] = {k.size(1),
                grad_key ? view_of(gk) : no_grad,
                view_of(gk_t),
                view_of(k),
                view_of(k_t),
                kw.const_data_ptr(),
                kw_t.const_data_ptr(),
                view_of(dk),
                view_of(dk_t),
                dkw.mutable_data_ptr(),
                dkw_t.mutable_data_ptr()};
  launch_backward(p, query);
  return {dq.result(),
          dk.result(),
          dqw,
          dkw,
          dq_t.result(),
          dk_t.result(),
          query_weight_t ? dqw_t : no_gradient(query_weight),
          key_weight_t ? dkw_t : no_gradient(key_weight)};
}

}  // namespace
}  // namespace pmf

PMF_IMPLEMENT(m) {
  m.impl("rotary_qk_norm", TORCH_BOX(&pmf::rotary_qk_norm));
  m.impl("rotary_qk_norm_jvp", TORCH_BOX(&pmf::rotary_qk_norm_jvp));
  m.impl("rotary_qk_norm_backward", TORCH_BOX(&pmf::rotary_qk_norm_backward));
  m.impl("rotary_qk_norm_jvp_backward", TORCH_BOX(&pmf::rotary_qk_norm_jvp_backward));
}
