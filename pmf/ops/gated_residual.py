"""A residual branch behind a learned gate: y = x + gate branch."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from pmf import reference

from ._autograd import KernelFunction, call, in_float32, register, vjp
from ._inputs import autocast_widest, check_tangents, zeros
from ._subclasses import operation

__all__ = ["gated_residual", "gated_residual_jvp"]

LAYOUTS = {"x": "...", "branch": "...", "gate": "*"}


@operation(LAYOUTS, "...")
def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Add a gated branch to the residual stream.

        y = x + gate branch

    Args:
        x, branch: [..., D], of one shape and dtype: float32, bfloat16, float16 or float64; any strides.
        gate: [D]; or as many dimensions as x, the leading ones in x's sizes and those up to D of size 1, such
            as [B, 1, D] for x [B, N, D]; in x's dtype.

    Returns [..., D] in x's dtype and memory layout, computed in float32 (float64 for float64) and rounded
    once.

    Raises ValueError where shapes or dtypes do not fit. torch.autograd.forward_ad inside torch.compile
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
        x_t, branch_t: tangents, or None for zero; of all samples (dimension 0) or of the first n.
        gate_t: the tangent of gate, or None for zero; where gate has samples, of the first n too.
        detach_tangent: the tangent is a constant for autograd, and backward costs what `gated_residual`'s
            does. Needed where n is smaller than the batch and gradients are wanted.

    Returns (y, ty) with ty of n samples. Both outputs are differentiable unless detached.
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


class _GatedResidual(KernelFunction):
    op = "gated_residual"
    unsaved: ClassVar[tuple[int, ...]] = (0,)
    samples: ClassVar[tuple[int, ...]] = (0, 1)

    @classmethod
    def shares_the_rest(cls, args: Any) -> bool:
        return args[2].dim() == 1

    @staticmethod
    @in_float32
    def reference(x: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        return (reference.gated_residual(x, branch, gate),)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        return (grads[0], *_GatedResidualBackward.apply(grads[0], *args[1:]))

    @classmethod
    def tangent(cls, args: Any, tangents: Any) -> Any:
        return (gated_residual_jvp(*args, *tangents)[1],)


class _GatedResidualBackward(KernelFunction):
    op = "gated_residual_backward"

    @staticmethod
    def reference(grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        return vjp(_GatedResidual.reference, (torch.zeros_like(branch), branch, gate), (grad,))[1:]


class _GatedResidualJvp(KernelFunction):
    op = "gated_residual_jvp"
    unsaved: ClassVar[tuple[int, ...]] = (0, 3)
    samples: ClassVar[tuple[int, ...]] = (0, 1, 3, 4)

    @classmethod
    def shares_the_rest(cls, args: Any) -> bool:
        return args[2].dim() == 1

    @staticmethod
    @in_float32
    def reference(*args: Tensor | None) -> tuple[Tensor, ...]:
        return reference.gated_residual_jvp(*args)  # type: ignore[arg-type]

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        if grads[1] is None:
            return _GatedResidualJvpDetached.gradient(grads, args, residuals, needed)
        _, branch, gate, _, branch_t, gate_t = args
        found = _GatedResidualJvpBackward.apply(*grads, branch, gate, branch_t, gate_t)
        return grads[0], found[0], found[1], grads[1], found[2], found[3]


class _GatedResidualJvpBackward(KernelFunction):
    op = "gated_residual_jvp_backward"

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
        found = vjp(_GatedResidualJvp.reference, (x, branch, gate, x_t, branch_t, gate_t), (grad, grad_t))
        return tuple(grad_t.new_empty(0) if found[i] is None else found[i] for i in (1, 2, 4, 5))


class _GatedResidualJvpDetached(_GatedResidualJvp):
    constants = 1
    unsaved: ClassVar[tuple[int, ...]] = (0, 3, 4, 5)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        return (*_GatedResidual.gradient(grads[:1], args[:3], (), needed), None, None, None)

    @classmethod
    def tangent(cls, args: Any, tangents: Any) -> Any:
        return _GatedResidual.tangent(args[:3], tangents[:3])


def _fake(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(x)


def _fake_jvp(
    x: Tensor, branch: Tensor, gate: Tensor, x_t: Tensor, branch_t: Tensor, gate_t: Tensor | None
) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(x_t)


def _fake_backward(grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    return torch.empty_like(branch), gate.new_empty(gate.shape)


def _fake_jvp_backward(
    grad: Tensor | None, grad_t: Tensor, branch: Tensor, gate: Tensor, branch_t: Tensor, gate_t: Tensor | None
) -> tuple[Tensor, ...]:
    grad_gate_t = gate.new_empty(0 if gate_t is None else gate.shape)
    return torch.empty_like(branch), gate.new_empty(gate.shape), torch.empty_like(branch_t), grad_gate_t


register("gated_residual", _GatedResidual, _fake)
register("gated_residual_backward", _GatedResidualBackward, _fake_backward)
register("gated_residual_jvp", _GatedResidualJvp, _fake_jvp)
register("gated_residual_jvp_backward", _GatedResidualJvpBackward, _fake_jvp_backward)
register("gated_residual_jvp_detached", _GatedResidualJvpDetached)
