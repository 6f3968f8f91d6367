// torch.ops.pmf.swiglu*: validate, allocate, launch. The mathematics is in pmf/swiglu.h.
#include "pmf/swiglu.h"

#include "cuda/rows/rows_launchers.h"
#include "ops/row_binding.h"

namespace pmf {
namespace {

constexpr const char* kOp = "swiglu";

void check_inputs(const Tensor& gate, const Tensor& up) {
  dtype_of(gate, kOp, "gate");
  check_value(gate.dim() >= 1, kOp, ": gate must be [..., D], got a scalar");
  check_like(kOp, "up", up, "gate", gate);
}

void launch(const Tensor& gate, const Tensor& up, const OptionalTensor& gate_t,
            const OptionalTensor& up_t, const Tensor& y, const OptionalTensor& y_t) {
  if (gate.numel() == 0) return;
  SwigluParams p;
  p.dtype = dtype_of(gate, kOp, "gate");
  RowBinder rows(kOp, gate);
  rows.bind(p.gate, gate).bind(p.up, up).bind(p.gate_t, gate_t).bind(p.up_t, up_t);
  p.shape = rows.bind(p.y, y).bind(p.y_t, y_t).finish();
  run(gate, kOp, &cpu::swiglu, PMF_CUDA_KERNEL(swiglu), p);
}

Tensor swiglu(Tensor gate, Tensor up) {
  check_inputs(gate, up);
  Output y(gate);
  launch(gate, up, {}, {}, y.buffer(), {});
  return y.result();
}

// Samples without a tangent go through the plain kernel.
std::tuple<Tensor, Tensor> swiglu_jvp(Tensor gate, Tensor up, Tensor gate_t, Tensor up_t) {
  check_inputs(gate, up);
  const int64_t n = check_tangent(kOp, "gate_t", gate_t, "gate", gate), rest = gate.size(0) - n;
  check_like(kOp, "up_t", up_t, "gate_t", gate_t);
  Output y(gate), y_t(gate_t);
  launch(samples(gate, 0, n), samples(up, 0, n), gate_t, up_t, samples(y.buffer(), 0, n),
         y_t.buffer());
  if (rest > 0) {
    launch(samples(gate, n, rest), samples(up, n, rest), {}, {}, samples(y.buffer(), n, rest), {});
  }
  return {y.result(), y_t.result()};
}

void launch_backward(const Tensor& grad, const OptionalTensor& grad_t, const Tensor& gate,
                     const Tensor& up, const OptionalTensor& gate_t, const OptionalTensor& up_t,
                     const Output& grad_gate, const Output& grad_up,
                     const std::optional<Output>& grad_gate_t,
                     const std::optional<Output>& grad_up_t) {
  if (gate.numel() == 0) return;
  SwigluBackwardParams p;
  p.dtype = dtype_of(gate, kOp, "gate");
  RowBinder rows(kOp, gate);
  rows.bind(p.grad, grad).bind(p.grad_t, grad_t);
  rows.bind(p.gate, gate).bind(p.up, up).bind(p.gate_t, gate_t).bind(p.up_t, up_t);
  rows.bind(p.grad_gate, grad_gate).bind(p.grad_up, grad_up);
  p.shape = rows.bind(p.grad_gate_t, grad_gate_t).bind(p.grad_up_t, grad_up_t).finish();
  run(gate, kOp, &cpu::swiglu_backward, PMF_CUDA_KERNEL(swiglu_backward), p);
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor grad, Tensor gate, Tensor up) {
  check_inputs(gate, up);
  check_like(kOp, "grad", grad, "gate", gate);
  Output grad_gate(gate), grad_up(up);
  launch_backward(grad, {}, gate, up, {}, {}, grad_gate, grad_up, {}, {});
  return {grad_gate.result(), grad_up.result()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> swiglu_jvp_backward(OptionalTensor grad, Tensor grad_t,
                                                               Tensor gate, Tensor up,
                                                               Tensor gate_t, Tensor up_t) {
  check_inputs(gate, up);
  check_like(kOp, "gate_t", gate_t, "gate", gate);
  check_like(kOp, "up_t", up_t, "gate", gate);
  check_like(kOp, "grad_t", grad_t, "gate", gate);
  check_like(kOp, "grad", grad, "gate", gate);
  Output grad_gate(gate), grad_up(up);
  std::optional<Output> grad_gate_t(gate_t), grad_up_t(up_t);
  launch_backward(or_zeros(grad, gate), grad_t, gate, up, gate_t, up_t, grad_gate, grad_up,
                  grad_gate_t, grad_up_t);
  return {grad_gate.result(), grad_up.result(), grad_gate_t->result(), grad_up_t->result()};
}

}  // namespace
}  // namespace pmf

PMF_IMPLEMENT(m) {
  m.impl("swiglu", TORCH_BOX(&pmf::swiglu));
  m.impl("swiglu_jvp", TORCH_BOX(&pmf::swiglu_jvp));
  m.impl("swiglu_backward", TORCH_BOX(&pmf::swiglu_backward));
  m.impl("swiglu_jvp_backward", TORCH_BOX(&pmf::swiglu_jvp_backward));
}
