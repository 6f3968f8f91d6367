// torch.ops.pmf.gated_residual*: validate, allocate, launch. The mathematics is in
// pmf/gated_residual.h.
#include "pmf/gated_residual.h"

#include "cuda/rows/rows_launchers.h"
#include "ops/row_binding.h"

namespace pmf {
namespace {

constexpr const char* kOp = "gated_residual";

// The gate is [D], or one vector per leading index: x's leading sizes, then ones, then D. Returns
// the number of vectors.
int64_t check_gate(const Tensor& gate, const Tensor& branch) {
  check_kind(kOp, "gate", gate, "branch", branch);
  const int64_t dims = branch.dim();
  bool fits =
      (gate.dim() == 1 || gate.dim() == dims) && gate.size(gate.dim() - 1) == branch.size(dims - 1);
  int64_t groups = 1, shared = 1;  // `shared`: rows of branch per vector so far
  for (int64_t d = 0; fits && gate.dim() == dims && d < dims - 1; ++d) {
    const int64_t own = gate.size(d), full = branch.size(d);
    fits = own == full ? shared == 1 || full == 1 : own == 1;
    if (own == full) groups *= own;
    if (own != full) shared *= full;
  }
  check_value(fits, kOp,
              ": gate must be [D], or have the leading sizes of x, then ones, then D; x is ",
              shape_of(branch), ", gate ", shape_of(gate));
  return groups;
}

int64_t check_inputs(const Tensor& branch, const Tensor& gate) {
  dtype_of(branch, kOp, "branch");
  check_value(branch.dim() >= 1, kOp, ": x and branch must be [..., D], got a scalar");
  return check_gate(gate, branch);
}

// The gate for the first samples: a gate [D], or one shared by all samples, serves any number.
Tensor gate_samples(const Tensor& gate, const Tensor& x, int64_t first, int64_t count) {
  const bool per_sample = gate.dim() > 1 && gate.size(0) == x.size(0) && x.size(0) > 1;
  return per_sample ? samples(gate, first, count) : gate;
}

void launch_backward(GatedResidualBackwardParams& p, const Tensor& branch) {
  if (branch.numel() == 0) return;
  const Workspace workspace(branch, gated_residual_workspace_bytes(p, takes_cuda_kernel(branch)));
  p.workspace = workspace.data();
  run(branch, kOp, &cpu::gated_residual_backward, PMF_CUDA_KERNEL(gated_residual_backward), p);
}

void launch(const Tensor& x, const Tensor& branch, const Tensor& gate, const OptionalTensor& x_t,
            const OptionalTensor& branch_t, const OptionalTensor& gate_t, const Tensor& y,
            const OptionalTensor& y_t) {
  if (x.numel() == 0) return;
  GatedResidualParams p;
  p.dtype = dtype_of(x, kOp, "x");
  RowBinder rows(kOp, x);
  rows.bind(p.x, x).bind(p.branch, branch).bind(p.gate, gate);
  rows.bind(p.x_t, x_t).bind(p.branch_t, branch_t).bind(p.gate_t, gate_t);
  p.shape = rows.bind(p.y, y).bind(p.y_t, y_t).finish();
  run(x, kOp, &cpu::gated_residual, PMF_CUDA_KERNEL(gated_residual), p);
}

Tensor gated_residual(Tensor x, Tensor branch, Tensor gate) {
  check_like(kOp, "branch", branch, "x", x);
  check_inputs(branch, gate);
  Output y(x);
  launch(x, branch, gate, {}, {}, {}, y.buffer(), {});
  return y.result();
}

// Samples without a tangent go through the plain kernel.
std::tuple<Tensor, Tensor> gated_residual_jvp(Tensor x, Tensor branch, Tensor gate, Tensor x_t,
                                              Tensor branch_t, OptionalTensor gate_t) {
  check_like(kOp, "branch", branch, "x", x);
  check_inputs(branch, gate);
  const int64_t n = check_tangent(kOp, "x_t", x_t, "x", x), rest = x.size(0) - n;
  check_like(kOp, "branch_t", branch_t, "x_t", x_t);
  const Tensor first_gate = gate_samples(gate, x, 0, n);
  check_like(kOp, "gate_t", gate_t, "gate (of the samples with tangents)", first_gate);
  Output y(x), y_t(x_t);
  launch(samples(x, 0, n), samples(branch, 0, n), first_gate, x_t, branch_t, or_zeros(gate_t, gate),
         samples(y.buffer(), 0, n), y_t.buffer());
  if (rest > 0) {
    launch(samples(x, n, rest), samples(branch, n, rest), gate_samples(gate, x, n, rest), {}, {},
           {}, samples(y.buffer(), n, rest), {});
  }
  return {y.result(), y_t.result()};
}

std::tuple<Tensor, Tensor> gated_residual_backward(Tensor grad, Tensor branch, Tensor gate) {
  const int64_t groups = check_inputs(branch, gate);
  check_like(kOp, "grad", grad, "branch", branch);
  Output grad_branch(branch);
  const Tensor grad_gate = gradient_of(gate, branch);
  GatedResidualBackwardParams p;
  p.dtype = dtype_of(branch, kOp, "branch");
  p.groups = groups;
  p.grad_gate = grad_gate.mutable_data_ptr();
  RowBinder rows(kOp, branch);
  rows.bind(p.grad, grad).bind(p.branch, branch).bind(p.gate, gate);
  p.shape = rows.bind(p.grad_branch, grad_branch).finish();
  launch_backward(p, branch);
  return {grad_branch.result(), grad_gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_jvp_backward(OptionalTensor grad,
                                                                       Tensor grad_t, Tensor branch,
                                                                       Tensor gate, Tensor branch_t,
                                                                       OptionalTensor gate_t) {
  const int64_t groups = check_inputs(branch, gate);
  check_like(kOp, "branch_t", branch_t, "branch", branch);
  check_like(kOp, "grad_t", grad_t, "branch", branch);
  check_like(kOp, "grad", grad, "branch", branch);
  check_like(kOp, "gate_t", gate_t, "gate", gate);
  Output grad_branch(branch), grad_branch_t(branch_t);
  const Tensor grad_gate = gradient_of(gate, branch);
  const Tensor grad_gate_t = gradient_of(gate, branch);
  GatedResidualBackwardParams p;
  p.dtype = dtype_of(branch, kOp, "branch");
  p.groups = groups;
  p.grad_gate = grad_gate.mutable_data_ptr();
  p.grad_gate_t = grad_gate_t.mutable_data_ptr();
  RowBinder rows(kOp, branch);
  rows.bind(p.grad, or_zeros(grad, branch)).bind(p.grad_t, grad_t);
  rows.bind(p.branch, branch).bind(p.branch_t, branch_t);
  rows.bind(p.gate, gate).bind(p.gate_t, or_zeros(gate_t, gate));
  p.shape = rows.bind(p.grad_branch, grad_branch).bind(p.grad_branch_t, grad_branch_t).finish();
  launch_backward(p, branch);
  return {grad_branch.result(), grad_gate, grad_branch_t.result(),
          gate_t ? grad_gate_t : no_gradient(gate)};
}

}  // namespace
}  // namespace pmf

PMF_IMPLEMENT(m) {
  m.impl("gated_residual", TORCH_BOX(&pmf::gated_residual));
  m.impl("gated_residual_jvp", TORCH_BOX(&pmf::gated_residual_jvp));
  m.impl("gated_residual_backward", TORCH_BOX(&pmf::gated_residual_backward));
  m.impl("gated_residual_jvp_backward", TORCH_BOX(&pmf::gated_residual_jvp_backward));
}
