"""A residual branch with a learned gate: y = x + gate branch."""

from typing import Any

import torch
from torch import Tensor

from pmf import reference

from ._autograd import Gradients, JvpFunction, KernelFunction, detached, reference_gradients
from ._dispatch import call, register
from ._inputs import autocast_widest, check_tangents, zeros
from ._plain import in_float32
from ._subclasses import operation

__all__ = ["gated_residual", "gated_residual_jvp"]

LAYOUTS = {"x": "...", "branch": "...", "gate": "*"}


@operation(LAYOUTS, "...")
def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Add a gated branch to the residual stream.

        y = x + gate branch

    Args:
        x, branch: [..., D], with the same shape and dtype: float32, bfloat16, float16 or float64; any
            strides.
        gate: [D]; or with as many dimensions as x, leading ones sized like x's followed by ones up to D, such
            as [B, 1, D] for x [B, N, D]; in x's dtype.

    Returns [..., D] in x's dtype and memory layout, computed in float32 (float64 for float64) and rounded
    once.

    Raises ValueError if shapes or dtypes do not fit. torch.autograd.forward_ad inside torch.compile
    raises RuntimeError: use `gated_residual_jvp`. Source: Touvron et al., "Going deeper with Image
    Transformers" (2021).
    """
    x, branch, gate = autocast_widest(2, x, branch, gate)
    return call("gated_residual", x, branch, gate)


@operation(LAYOUTS, "...", "...")
def gated_residual_jvp(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    x_t: Tensor | None,
    branch_t: Tensor | None,
    gate_t: Tensor | None = None,
    *,
    detach_tangent: bool = False,
) -> tuple[Tensor, Tensor]:
    """`gated_residual` and its tangent in one pass.

        ty = tx + gate tbranch + tgate branch

    Args:
        x, branch, gate: as for `gated_residual`.
        x_t, branch_t: tangents, or None for zero; for all samples (dimension 0) or the first n.
        gate_t: the tangent of gate, or None for zero; if gate has samples, also for the first n.
        detach_tangent: treat the tangent as a constant for autograd, so that backward costs the same as
            `gated_residual`'s. Required if n is smaller than the batch and gradients are needed.

    Returns (y, ty), ty for n samples. Both outputs are differentiable unless detached.

    Raises ValueError like `gated_residual`, and if tangents do not fit.
    """
    x, branch, gate, x_t, branch_t, gate_t = autocast_widest(2, x, branch, gate, x_t, branch_t, gate_t)
    count = check_tangents(
        "gated_residual_jvp",
        [("x_t", x, x_t), ("branch_t", branch, branch_t)],
        detach_tangent,
        (gate, gate_t),
    )
    if count is None and gate_t is None:
        return gated_residual(x, branch, gate), torch.zeros_like(x)
    x_t = zeros(x, count) if x_t is None else x_t
    branch_t = zeros(branch, count) if branch_t is None else branch_t
    op = "gated_residual_jvp_detached" if detach_tangent else "gated_residual_jvp"
    return call(op, x, branch, gate, x_t, branch_t, gate_t)


def _has_samples(gate: Tensor | None) -> bool:
    """Whether there is a gate for each sample; [1, ..., D] and [D] are one for all."""
    return gate is not None and gate.dim() > 1 and gate.shape[0] != 1


class _GatedResidual(KernelFunction):
    op = "gated_residual"
    unsaved = ("x",)
    samples = ("x", "branch")

    @staticmethod
    @in_float32
    def reference(x: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        return (reference.gated_residual(x, branch, gate),)

    @staticmethod
    def fake(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return torch.empty_like(x)

    @classmethod
    def batched(cls, args: Any) -> Any:
        return (*cls.samples, "gate") if _has_samples(args.gate) else cls.samples

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        return {"x": grads.y, **_GatedResidualBackward.by_name(grads.y, args.branch, args.gate)}

    @classmethod
    def tangent(cls, args: Any, tangents: Any) -> Any:
        return (gated_residual_jvp(*args, *tangents)[1],)


class _GatedResidualBackward(Gradients):
    of = _GatedResidual
    op = "gated_residual_backward"
    outputs = ("branch", "gate")

    @staticmethod
    def reference(grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        outputs = _GatedResidualBackward.outputs
        return reference_gradients(_GatedResidual, outputs, (grad,), torch.zeros_like(branch), branch, gate)

    @staticmethod
    def fake(grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        return torch.empty_like(branch), gate.new_empty(gate.shape)


class _GatedResidualJvp(JvpFunction):
    value = _GatedResidual
    op = "gated_residual_jvp"
    outputs = ("y", "y_t")
    unsaved = ("x", "x_t")
    samples = ("x", "branch", "x_t", "branch_t")

    @staticmethod
    @in_float32
    def reference(
        x: Tensor, branch: Tensor, gate: Tensor, x_t: Tensor, branch_t: Tensor, gate_t: Tensor | None
    ) -> tuple[Tensor, ...]:
        return reference.gated_residual_jvp(x, branch, gate, x_t, branch_t, gate_t)

    @staticmethod
    def fake(
        x: Tensor, branch: Tensor, gate: Tensor, x_t: Tensor, branch_t: Tensor, gate_t: Tensor | None
    ) -> tuple[Tensor, ...]:
        return torch.empty_like(x), torch.empty_like(x_t)

    @classmethod
    def batched(cls, args: Any) -> Any:
        gates = (name for name in ("gate", "gate_t") if _has_samples(getattr(args, name)))
        return (*cls.samples, *gates)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        found = _GatedResidualJvpBackward.by_name(*grads, args.branch, args.gate, args.branch_t, args.gate_t)
        return {"x": grads.y, "x_t": grads.y_t, **found}


class _GatedResidualJvpBackward(Gradients):
    of = _GatedResidualJvp
    op = "gated_residual_jvp_backward"
    outputs = ("branch", "gate", "branch_t", "gate_t")

    @staticmethod
    def reference(
        grad: Tensor | None,
        grad_t: Tensor,
        branch: Tensor,
        gate: Tensor,
        branch_t: Tensor,
        gate_t: Tensor | None,
    ) -> tuple[Tensor, ...]:
        x, x_t = torch.zeros_like(branch), torch.zeros_like(branch_t)
        args = x, branch, gate, x_t, branch_t, gate_t
        outputs = _GatedResidualJvpBackward.outputs
        return reference_gradients(_GatedResidualJvp, outputs, (grad, grad_t), *args)

    @staticmethod
    def fake(
        grad: Tensor | None,
        grad_t: Tensor,
        branch: Tensor,
        gate: Tensor,
        branch_t: Tensor,
        gate_t: Tensor | None,
    ) -> tuple[Tensor, ...]:
        grad_gate_t = gate.new_empty(0 if gate_t is None else gate.shape)
        return torch.empty_like(branch), gate.new_empty(gate.shape), torch.empty_like(branch_t), grad_gate_t


register("gated_residual", _GatedResidual)
register("gated_residual_backward", _GatedResidualBackward)
register("gated_residual_jvp", _GatedResidualJvp)
register("gated_residual_jvp_backward", _GatedResidualJvpBackward)
register("gated_residual_jvp_detached", detached(_GatedResidualJvp))
