"""The read-out: tokens back to images and at once to a velocity, written without the image in between."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from pmf import reference

from ._autograd import KernelFunction, call, in_float32, register, vjp
from ._inputs import check_tangents, zeros
from ._subclasses import operation

__all__ = ["patch_velocity", "patch_velocity_jvp"]

LAYOUTS = {"tokens": "b _ _", "images": "b _ _ _", "t": "b"}


@operation(LAYOUTS, "b _ _ _")
def patch_velocity(tokens: Tensor, images: Tensor, t: Tensor, floor: float = 0.05) -> Tensor:
    """The velocity from the image that tokens show to a noisy one.

        v = (images - x) / clip(t, floor, 1)
        x[b, c, r p + i, q p + j] = tokens[b, r W / p + q, (i p + j) C + c]

    Args:
        tokens: [B, N, p p C] with N = (H / p) (W / p); float32, bfloat16, float16 or float64; any strides.
        images: [B, C, H, W], in the dtype of tokens, or float32 beside 16-bit tokens.
        t: [B], times of any floating dtype. One that requires a gradient gets it from the reference.
        floor: what times are clipped to from below, above 0.

    Returns [B, C, H, W] in the dtype of images, computed in float32 (float64 for float64) and rounded once.

    Raises ValueError where shapes or dtypes do not fit. torch.autograd.forward_ad inside torch.compile raises
    RuntimeError: use `patch_velocity_jvp`. Source: Lu et al., "One-step Latent-free Image Generation with
    Pixel Mean Flows" (2026).
    """
    return call("patch_velocity", tokens, images, _times(t, tokens), floor)


@operation(LAYOUTS, "b _ _ _", "b _ _ _")
def patch_velocity_jvp(
    tokens: Tensor,
    images: Tensor,
    t: Tensor,
    tokens_t: Tensor | None,
    images_t: Tensor | None,
    t_t: Tensor | None,
    floor: float = 0.05,
    *,
    detach_tangent: bool = False,
) -> tuple[Tensor, Tensor]:
    """`patch_velocity` and its tangent in one pass.

        tv = (timages - tx) / s - tt m v / s,  s = clip(t, floor, 1),  m = 1 where floor <= t <= 1, else 0

    Args:
        tokens, images, t, floor: as for `patch_velocity`.
        tokens_t, images_t, t_t: tangents, or None for zero; of all samples (dimension 0) or of the first n.
        detach_tangent: the tangent is a constant for autograd, and backward costs what `patch_velocity`'s
            does. Needed where n is smaller than the batch and gradients are wanted.

    Returns (v, tv) with tv of n samples. Both outputs are differentiable unless detached.
    """
    pairs = [("tokens_t", tokens, tokens_t), ("images_t", images, images_t)]
    count = check_tangents("patch_velocity_jvp", pairs, detach_tangent, (t, t_t))
    if count is None:
        if t_t is None:
            return patch_velocity(tokens, images, t, floor), torch.zeros_like(images)
        count = t_t.shape[0]
    tokens_t = zeros(tokens, count) if tokens_t is None else tokens_t
    images_t = zeros(images, count) if images_t is None else images_t
    t = _times(t, tokens)
    t_t = zeros(t, count) if t_t is None else _times(t_t, tokens)
    op = "patch_velocity_jvp_detached" if detach_tangent else "patch_velocity_jvp"
    return call(op, tokens, images, t, tokens_t, images_t, t_t, floor)


def _times(t: Tensor, tokens: Tensor) -> Tensor:
    """As the kernel reads them."""
    return t.to(torch.float64 if tokens.dtype == torch.float64 else torch.float32)


class _PatchVelocity(KernelFunction):
    """Backward keeps t alone, but for a gradient of t, which is the reference's."""

    op = "patch_velocity"
    samples: ClassVar[tuple[int, ...]] = (0, 1, 2)
    by_reference: ClassVar[tuple[int, ...]] = (2,)

    @staticmethod
    def reference(tokens: Tensor, images: Tensor, t: Tensor, floor: float) -> tuple[Tensor, ...]:
        return _as_images(reference.patch_velocity)(tokens, images, t, floor)

    @classmethod
    def save(cls, ctx: Any, inputs: Any, output: Any) -> None:
        super().save(ctx, inputs if ctx.needs_input_grad[2] else _without_samples(inputs), output)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        tokens, _, t, floor = args
        grad = grads[0]
        grad_tokens = _PatchVelocityBackward.apply(grad, tokens, t, floor) if needed[0] else None
        grad_images = None
        if needed[1]:
            grad_images = (grad / t.clamp(floor, 1.0)[:, None, None, None]).to(grad.dtype)
        return grad_tokens, grad_images, None, None

    @classmethod
    def tangent(cls, args: Any, tangents: Any) -> Any:
        tokens, images, t, floor = args
        tokens_t, images_t, t_t = tangents[:3]
        return (patch_velocity_jvp(tokens, images, t, tokens_t, images_t, t_t, floor)[1],)


class _PatchVelocityBackward(KernelFunction):
    """(grad, tokens of no samples, t, floor) -> the gradient of the tokens."""

    op = "patch_velocity_backward"

    @staticmethod
    def reference(grad: Tensor, tokens: Tensor, t: Tensor, floor: float) -> tuple[Tensor, ...]:
        like = tokens.new_zeros((grad.shape[0], *tokens.shape[1:]))
        images = torch.zeros_like(grad)
        found = vjp(_PatchVelocity.reference, (like, images, t, floor), (grad,))[0]
        return (found,)


class _PatchVelocityJvp(KernelFunction):
    op = "patch_velocity_jvp"
    samples: ClassVar[tuple[int, ...]] = (0, 1, 2, 3, 4, 5)

    @staticmethod
    def reference(*args: Any) -> tuple[Tensor, ...]:
        return _as_images(reference.patch_velocity_jvp)(*args)


class _PatchVelocityJvpDetached(_PatchVelocityJvp):
    constants = 1
    unsaved: ClassVar[tuple[int, ...]] = (3, 4, 5)
    by_reference: ClassVar[tuple[int, ...]] = (2,)

    @staticmethod
    def reference(*args: Any) -> tuple[Tensor, ...]:
        tokens, images, t, *_, floor = args
        return _PatchVelocity.reference(tokens, images, t, floor)

    @classmethod
    def save(cls, ctx: Any, inputs: Any, output: Any) -> None:
        super().save(ctx, inputs if ctx.needs_input_grad[2] else _without_samples(inputs), output)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        found = _PatchVelocity.gradient(grads[:1], (*args[:3], args[6]), (), needed)
        return (*found[:3], None, None, None, None)

    @classmethod
    def tangent(cls, args: Any, tangents: Any) -> Any:
        return _PatchVelocity.tangent((*args[:3], args[6]), tangents[:3])


def _as_images(function: Any) -> Any:
    """A reference of (tokens, images, ...), whose results have the dtype of images."""
    return in_float32(lambda *args: _tuple(function(*args)), like=1)


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else x


def _without_samples(inputs: Any) -> tuple[Any, ...]:
    """The inputs with tokens and images of no samples: their dtype and shape remain."""
    tokens, images, *rest = inputs
    return *(x.new_empty((0, *x.shape[1:])) for x in (tokens, images)), *rest


def _fake(tokens: Tensor, images: Tensor, t: Tensor, floor: float) -> Tensor:
    return images.new_empty(images.shape)


def _fake_jvp(
    tokens: Tensor,
    images: Tensor,
    t: Tensor,
    tokens_t: Tensor,
    images_t: Tensor,
    t_t: Tensor,
    floor: float,
) -> tuple[Tensor, ...]:
    return images.new_empty(images.shape), images.new_empty(images_t.shape)


def _fake_backward(grad: Tensor, tokens: Tensor, t: Tensor, floor: float) -> Tensor:
    return tokens.new_empty((grad.shape[0], *tokens.shape[1:]))


register("patch_velocity", _PatchVelocity, _fake)
register("patch_velocity_backward", _PatchVelocityBackward, _fake_backward)
register("patch_velocity_jvp", _PatchVelocityJvp, _fake_jvp)
register("patch_velocity_jvp_detached", _PatchVelocityJvpDetached)
