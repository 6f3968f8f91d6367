"""Root-mean-square normalisation: y = w x / sqrt(mean x^2 + eps)."""

from typing import Any

import torch
from torch import Tensor

from pmf import reference

from ._autograd import Gradients, JvpFunction, KernelFunction, detached
from ._dispatch import call, register
from ._inputs import autocast_widest, check_constant, check_tangents, zeros
from ._plain import in_float32
from ._subclasses import operation

__all__ = ["rms_norm", "rms_norm_jvp"]

LAYOUTS = {"x": "... _", "weight": "_"}


@operation(LAYOUTS, "... _")
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square normalisation over the last dimension.

        y = weight x / sqrt(mean x^2 + eps)

    Args:
        x: [..., D], float32, bfloat16, float16 or float64; any strides.
        weight: [D], in x's dtype.

    Returns [..., D] in x's dtype and memory layout, computed in float32 (float64 for float64) and rounded
    once.

    Raises ValueError if shapes or dtypes do not fit. torch.autograd.forward_ad inside torch.compile
    raises RuntimeError: use `rms_norm_jvp`. Source: Zhang and Sennrich, "Root Mean Square Layer
    Normalization" (2019).
    """
    check_constant("rms_norm", "eps", eps)
    x, weight = autocast_widest(1, x, weight)
    return call("rms_norm", x, weight, eps)


@operation(LAYOUTS, "... _", "... _")
def rms_norm_jvp(
    x: Tensor,
    weight: Tensor,
    x_t: Tensor | None,
    weight_t: Tensor | None = None,
    eps: float = 1e-6,
    *,
    detach_tangent: bool = False,
) -> tuple[Tensor, Tensor]:
    """`rms_norm` and its tangent in one pass.

        n = x s,  g = tx s,  s = rsqrt(mean x^2 + eps)      ty = (g - n mean(n g)) weight + n tweight

    Args:
        x, weight: as for `rms_norm`.
        x_t: the tangent of x, or None for zero; for all samples (dimension 0) or the first n.
        weight_t: the tangent of weight, or None for zero.
        detach_tangent: treat the tangent as a constant for autograd, so that backward costs the same as
            `rms_norm`'s. Required if n is smaller than the batch and gradients are needed.

    Returns (y, ty), ty for n samples. Both outputs are differentiable unless detached.

    Raises ValueError like `rms_norm`, and if tangents do not fit.
    """
    check_constant("rms_norm_jvp", "eps", eps)
    x, weight, x_t, weight_t = autocast_widest(1, x, weight, x_t, weight_t)
    check_tangents("rms_norm_jvp", [("x_t", x, x_t)], detach_tangent, (weight, weight_t))
    if x_t is None:
        if weight_t is None:
            return rms_norm(x, weight, eps), torch.zeros_like(x)
        x_t = zeros(x)
    return call("rms_norm_jvp_detached" if detach_tangent else "rms_norm_jvp", x, weight, x_t, weight_t, eps)


class _RmsNorm(KernelFunction):
    op = "rms_norm"
    samples = ("x",)

    @staticmethod
    @in_float32
    def reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        return (reference.rms_norm(x, weight, eps),)

    @staticmethod
    def fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.empty_like(x)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        return _RmsNormBackward.by_name(grads.y, *args)

    @classmethod
    def tangent(cls, args: Any, tangents: Any) -> Any:
        return (rms_norm_jvp(args.x, args.weight, tangents.x, tangents.weight, args.eps)[1],)


class _RmsNormBackward(Gradients):
    of = _RmsNorm
    op = "rms_norm_backward"
    outputs = ("x", "weight")


class _RmsNormJvp(JvpFunction):
    value = _RmsNorm
    op = "rms_norm_jvp"
    outputs = ("y", "y_t")
    samples = ("x", "x_t")

    @staticmethod
    @in_float32
    def reference(
        x: Tensor, weight: Tensor, x_t: Tensor, weight_t: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        return reference.rms_norm_jvp(x, weight, x_t, weight_t, eps)

    @staticmethod
    def fake(
        x: Tensor, weight: Tensor, x_t: Tensor, weight_t: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        return torch.empty_like(x), torch.empty_like(x_t)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        return _RmsNormJvpBackward.by_name(*grads, *args)


class _RmsNormJvpBackward(Gradients):
    of = _RmsNormJvp
    op = "rms_norm_jvp_backward"
    outputs = ("x", "weight", "x_t", "weight_t")


register("rms_norm", _RmsNorm)
register("rms_norm_backward", _RmsNormBackward)
register("rms_norm_jvp", _RmsNormJvp)
register("rms_norm_jvp_backward", _RmsNormJvpBackward)
register("rms_norm_jvp_detached", detached(_RmsNormJvp))
