// torch.ops.pmf.rms_norm*: validate, allocate, launch. The mathematics is in pmf/rms_norm.h.
#include "pmf/rms_norm.h"

#include "cuda/rows/rows_launchers.h"
#include "ops/row_binding.h"

namespace pmf {
namespace {

constexpr const char* kOp = "rms_norm";

void check_inputs(const Tensor& x, const Tensor& weight) {
  dtype_of(x, kOp, "x");
  check_value(x.dim() >= 1, kOp, ": x must be [..., D], got a scalar");
  check_vector(kOp, "weight", weight, "x", x);
}

void launch(const Tensor& x, const Tensor& weight, const OptionalTensor& x_t,
            const OptionalTensor& weight_t, const Tensor& y, const OptionalTensor& y_t,
            double eps) {
  if (x.numel() == 0) return;
  RmsNormParams p;
  p.dtype = dtype_of(x, kOp, "x");
  p.eps = eps;
  p.weight = weight.const_data_ptr();
  p.weight_t = weight_t ? weight_t->const_data_ptr() : nullptr;
  RowBinder rows(kOp, x);
  p.shape = rows.bind(p.x, x).bind(p.x_t, x_t).bind(p.y, y).bind(p.y_t, y_t).finish();
  run(x, kOp, &cpu::rms_norm, PMF_CUDA_KERNEL(rms_norm), p);
}

void launch_backward(RmsNormBackwardParams& p, const Tensor& x) {
  if (x.numel() == 0) return;
  const Workspace workspace(x, rms_norm_workspace_bytes(p, takes_cuda_kernel(x)));
  p.workspace = workspace.data();
  run(x, kOp, &cpu::rms_norm_backward, PMF_CUDA_KERNEL(rms_norm_backward), p);
}

// weight_t as the kernel needs it: contiguous, zeros if absent.
Tensor tangent_of_weight(const Tensor& weight, const OptionalTensor& weight_t) {
  if (!weight_t) return zeros_vector(weight, weight.size(0));
  check_like(kOp, "weight_t", *weight_t, "weight", weight);
  return readable(*weight_t);
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  check_inputs(x, weight);
  Output y(x);
  launch(x, readable(weight), {}, {}, y.buffer(), {}, eps);
  return y.result();
}

// Samples without a tangent go through the plain kernel.
std::tuple<Tensor, Tensor> rms_norm_jvp(Tensor x, Tensor weight, Tensor x_t,
                                        OptionalTensor weight_t, double eps) {
  check_inputs(x, weight);
  const int64_t n = check_tangent(kOp, "x_t", x_t, "x", x), rest = x.size(0) - n;
  const Tensor w = readable(weight), w_t = tangent_of_weight(weight, weight_t);
  Output y(x), y_t(x_t);
  launch(samples(x, 0, n), w, x_t, w_t, samples(y.buffer(), 0, n), y_t.buffer(), eps);
  if (rest > 0) launch(samples(x, n, rest), w, {}, {}, samples(y.buffer(), n, rest), {}, eps);
  return {y.result(), y_t.result()};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, Tensor x, Tensor weight, double eps) {
  check_inputs(x, weight);
  check_like(kOp, "grad", grad, "x", x);
  Output grad_x(x);
  const Tensor grad_weight = gradient_of(weight, x);
  const Tensor w = readable(weight);
  RmsNormBackwardParams p;
  p.dtype = dtype_of(x, kOp, "x");
  p.eps = eps;
  p.weight = w.const_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  RowBinder rows(kOp, x);
  p.shape = rows.bind(p.grad, grad).bind(p.x, x).bind(p.grad_x, grad_x).finish();
  launch_backward(p, x);
  return {grad_x.result(), grad_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_jvp_backward(OptionalTensor grad, Tensor grad_t,
                                                                 Tensor x, Tensor weight,
                                                                 Tensor x_t,
                                                                 OptionalTensor weight_t,
                                                                 double eps) {
  check_inputs(x, weight);
  check_like(kOp, "x_t", x_t, "x", x);
  check_like(kOp, "grad_t", grad_t, "x", x);
  check_like(kOp, "grad", grad, "x", x);
  Output grad_x(x), grad_x_t(x_t);
  const Tensor grad_weight = gradient_of(weight, x);
  const Tensor grad_weight_t = gradient_of(weight, x);
  const Tensor w = readable(weight), w_t = tangent_of_weight(weight, weight_t);
  RmsNormBackwardParams p;
  p.dtype = dtype_of(x, kOp, "x");
  p.eps = eps;
  p.weight = w.const_data_ptr();
  p.weight_t = w_t.const_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  p.grad_weight_t = grad_weight_t.mutable_data_ptr();
  RowBinder rows(kOp, x);
  rows.bind(p.grad, or_zeros(grad, x)).bind(p.grad_t, grad_t).bind(p.x, x).bind(p.x_t, x_t);
  p.shape = rows.bind(p.grad_x, grad_x).bind(p.grad_x_t, grad_x_t).finish();
  launch_backward(p, x);
  return {grad_x.result(), grad_weight, grad_x_t.result(),
          weight_t ? grad_weight_t : no_gradient(weight)};
}

}  // namespace
}  // namespace pmf

PMF_IMPLEMENT(m) {
  m.impl("rms_norm", TORCH_BOX(&pmf::rms_norm));
  m.impl("rms_norm_jvp", TORCH_BOX(&pmf::rms_norm_jvp));
  m.impl("rms_norm_backward", TORCH_BOX(&pmf::rms_norm_backward));
  m.impl("rms_norm_jvp_backward", TORCH_BOX(&pmf::rms_norm_jvp_backward));
}
