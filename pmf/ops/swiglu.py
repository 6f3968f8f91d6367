"""The SwiGLU gate: y = silu(gate) up."""

from typing import Any

import torch
from torch import Tensor

from pmf import reference

from ._autograd import Gradients, JvpFunction, KernelFunction, detached
from ._dispatch import call, register
from ._inputs import autocast_widest, check_tangents, zeros
from ._plain import in_float32
from ._subclasses import operation

__all__ = ["swiglu", "swiglu_jvp"]

LAYOUTS = {"gate": "...", "up": "..."}


@operation(LAYOUTS, "...")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU gate, reading each input once.

        y = gate sigmoid(gate) up

    Args:
        gate, up: [..., D], with the same shape and dtype: float32, bfloat16, float16 or float64; any strides.

    Returns [..., D] in the same dtype, computed in float32 (float64 for float64) and rounded once.

    Raises ValueError if shapes or dtypes differ. torch.autograd.forward_ad inside torch.compile raises
    RuntimeError: use `swiglu_jvp`. Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    gate, up = autocast_widest(2, gate, up)
    return call("swiglu", gate, up)


@operation(LAYOUTS, "...", "...")
def swiglu_jvp(
    gate: Tensor, up: Tensor, gate_t: Tensor | None, up_t: Tensor | None, *, detach_tangent: bool = False
) -> tuple[Tensor, Tensor]:
    """`swiglu` and its tangent in one pass.

        ty = (s + gate s (1 - s)) tgate up + gate s tup,  s = sigmoid(gate)

    Args:
        gate, up: as for `swiglu`.
        gate_t, up_t: their tangents, or None for zero; for all samples (dimension 0) or the first n.
        detach_tangent: treat the tangent as a constant for autograd, so that backward costs the same as
            `swiglu`'s. Required if n is smaller than the batch and gradients are needed.

    Returns (y, ty), ty for n samples. Both outputs are differentiable unless detached.

    Raises ValueError like `swiglu`, and if tangents do not fit.
    """
    gate, up, gate_t, up_t = autocast_widest(2, gate, up, gate_t, up_t)
    count = check_tangents("swiglu_jvp", [("gate_t", gate, gate_t), ("up_t", up, up_t)], detach_tangent)
    if count is None:
        return swiglu(gate, up), torch.zeros_like(gate)
    gate_t = zeros(gate, count) if gate_t is None else gate_t
    up_t = zeros(up, count) if up_t is None else up_t
    return call("swiglu_jvp_detached" if detach_tangent else "swiglu_jvp", gate, up, gate_t, up_t)


class _Swiglu(KernelFunction):
    op = "swiglu"
    samples = ("gate", "up")

    @staticmethod
    @in_float32
    def reference(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return (reference.swiglu(gate, up),)

    @staticmethod
    def fake(gate: Tensor, up: Tensor) -> Tensor:
        return torch.empty_like(gate)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        return _SwigluBackward.by_name(grads.y, *args)

    @classmethod
    def tangent(cls, args: Any, tangents: Any) -> Any:
        return (swiglu_jvp(*args, *tangents)[1],)


class _SwigluBackward(Gradients):
    of = _Swiglu
    op = "swiglu_backward"
    outputs = ("gate", "up")


class _SwigluJvp(JvpFunction):
    value = _Swiglu
    op = "swiglu_jvp"
    outputs = ("y", "y_t")
    samples = ("gate", "up", "gate_t", "up_t")

    @staticmethod
    @in_float32
    def reference(gate: Tensor, up: Tensor, gate_t: Tensor, up_t: Tensor) -> tuple[Tensor, ...]:
        return reference.swiglu_jvp(gate, up, gate_t, up_t)

    @staticmethod
    def fake(gate: Tensor, up: Tensor, gate_t: Tensor, up_t: Tensor) -> tuple[Tensor, ...]:
        return torch.empty_like(gate), torch.empty_like(gate_t)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        return _SwigluJvpBackward.by_name(*grads, *args)


class _SwigluJvpBackward(Gradients):
    of = _SwigluJvp
    op = "swiglu_jvp_backward"
    outputs = ("gate", "up", "gate_t", "up_t")


register("swiglu", _Swiglu)
register("swiglu_backward", _SwigluBackward)
register("swiglu_jvp", _SwigluJvp)
register("swiglu_jvp_backward", _SwigluJvpBackward)
register("swiglu_jvp_detached", detached(_SwigluJvp))
