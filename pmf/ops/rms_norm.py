"""Root-mean-square normalisation: y = w x / sqrt(mean x^2 + eps)."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from pmf import reference

from ._autograd import KernelFunction, call, in_float32, register, vjp
from ._inputs import autocast_widest, check_tangents, zeros
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

    Raises ValueError where shapes or dtypes do not fit. torch.autograd.forward_ad inside torch.compile
    raises RuntimeError: use `rms_norm_jvp`. Source: Zhang and Sennrich, "Root Mean Square Layer
    Normalization" (2019).
    """
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
        x_t: the tangent of x, or None for zero; of all samples (dimension 0) or of the first n.
        weight_t: the tangent of weight, or None for zero.
        detach_tangent: the tangent is a constant for autograd, and backward costs what `rms_norm`'s does.
            Needed where n is smaller than the batch and gradients are wanted.

    Returns (y, ty) with ty of n samples. Both outputs are differentiable unless detached.
    """
    x, weight, x_t, weight_t = autocast_widest(1, x, weight, x_t, weight_t)
    check_tangents("rms_norm_jvp", [("x_t", x, x_t)], detach_tangent, (weight, weight_t))
    if x_t is None:
        if weight_t is None:
            return rms_norm(x, weight, eps), torch.zeros_like(x)
        x_t = zeros(x)
    return call("rms_norm_jvp_detached" if detach_tangent else "rms_norm_jvp", x, weight, x_t, weight_t, eps)


class _RmsNorm(KernelFunction):
    op = "rms_norm"
    samples: ClassVar[tuple[int, ...]] = (0,)

    @staticmethod
    @in_float32
    def reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        return (reference.rms_norm(x, weight, eps),)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        return (*_RmsNormBackward.apply(*grads, *args), None)

    @classmethod
    def tangent(cls, args: Any, tangents: Any) -> Any:
        x, weight, eps = args
        return (rms_norm_jvp(x, weight, tangents[0], tangents[1], eps)[1],)


class _RmsNormBackward(KernelFunction):
    op = "rms_norm_backward"

    @staticmethod
    def reference(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return vjp(_RmsNorm.reference, args, (grad,))[:2]


class _RmsNormJvp(KernelFunction):
    op = "rms_norm_jvp"
    samples: ClassVar[tuple[int, ...]] = (0, 2)

    @staticmethod
    @in_float32
    def reference(
        x: Tensor, weight: Tensor, x_t: Tensor, weight_t: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        return reference.rms_norm_jvp(x, weight, x_t, weight_t, eps)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        if grads[1] is None:
            return _RmsNormJvpDetached.gradient(grads, args, residuals, needed)
        return (*_RmsNormJvpBackward.apply(*grads, *args), None)


class _RmsNormJvpBackward(KernelFunction):
    op = "rms_norm_jvp_backward"

    @staticmethod
    def reference(grad: Tensor | None, grad_t: Tensor, *args: Any) -> tuple[Tensor, ...]:
        found = vjp(_RmsNormJvp.reference, args, (grad, grad_t))[:4]
        return tuple(grad_t.new_empty(0) if x is None else x for x in found)


class _RmsNormJvpDetached(_RmsNormJvp):
    constants = 1
    unsaved: ClassVar[tuple[int, ...]] = (2, 3)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        x, weight = _RmsNormBackward.apply(grads[0], args[0], args[1], args[4])
        return x, weight, None, None, None

    @classmethod
    def tangent(cls, args: Any, tangents: Any) -> Any:
        return _RmsNorm.tangent((args[0], args[1], args[4]), tangents[:2])


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def _fake_jvp(
    x: Tensor, weight: Tensor, x_t: Tensor, weight_t: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(x_t)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    return torch.empty_like(x), weight.new_empty(weight.shape)


def _fake_jvp_backward(
    grad: Tensor | None,
    grad_t: Tensor,
    x: Tensor,
    weight: Tensor,
    x_t: Tensor,
    weight_t: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    grad_weight_t = weight.new_empty(0 if weight_t is None else weight.shape)
    return torch.empty_like(x), weight.new_empty(weight.shape), torch.empty_like(x_t), grad_weight_t


register("rms_norm", _RmsNorm, _fake)
register("rms_norm_backward", _RmsNormBackward, _fake_backward)
register("rms_norm_jvp", _RmsNormJvp, _fake_jvp)
register("rms_norm_jvp_backward", _RmsNormJvpBackward, _fake_jvp_backward)
register("rms_norm_jvp_detached", _RmsNormJvpDetached)
