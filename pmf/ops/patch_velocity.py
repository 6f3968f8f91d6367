"""The read-out: tokens to images and directly to a velocity, without storing the image in between."""

from typing import Any

import torch
from torch import Tensor

from pmf import reference

from ._autograd import Gradients, JvpFunction, KernelFunction, detached, reference_gradients
from ._dispatch import call, register
from ._inputs import check_constant, check_tangents, zeros
from ._plain import in_float32
from ._subclasses import operation

__all__ = ["patch_velocity", "patch_velocity_jvp"]

LAYOUTS = {"tokens": "b _ _", "images": "b _ _ _", "t": "b"}


@operation(LAYOUTS, "b _ _ _")
def patch_velocity(tokens: Tensor, images: Tensor, t: Tensor, floor: float = 0.05) -> Tensor:
    """The velocity from the image given by tokens to a noisy one.

        v = (images - x) / clip(t, floor, 1)
        x[b, c, r p + i, q p + j] = tokens[b, r W / p + q, (i p + j) C + c]

    Args:
        tokens: [B, N, p p C] with N = (H / p) (W / p); float32, bfloat16, float16 or float64; any strides.
        images: [B, C, H, W], in the dtype of tokens, or float32 with 16-bit tokens.
        t: [B], times of any floating dtype. If it requires a gradient, that comes from the reference.
        floor: lower bound to which times are clipped, above 0.

    Returns [B, C, H, W] in the dtype of images, computed in float32 (float64 for float64) and rounded once.

    Raises ValueError if shapes or dtypes do not fit. torch.autograd.forward_ad inside torch.compile raises
    RuntimeError: use `patch_velocity_jvp`. Source: Lu et al., "One-step Latent-free Image Generation with
    Pixel Mean Flows" (2026).
    """
    check_constant("patch_velocity", "floor", floor)
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
        tokens_t, images_t, t_t: tangents, or None for zero; for all samples (dimension 0) or the first n.
        detach_tangent: treat the tangent as a constant for autograd, so that backward costs the same as
            `patch_velocity`'s. Required if n is smaller than the batch and gradients are needed.

    Returns (v, tv), tv for n samples. Both outputs are differentiable unless detached.

    Raises ValueError like `patch_velocity`, and if tangents do not fit.
    """
    check_constant("patch_velocity_jvp", "floor", floor)
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
    """The times in the kernel's format."""
    return t.to(torch.float64 if tokens.dtype == torch.float64 else torch.float32)


def _as_images(function: Any) -> Any:
    """A reference of (tokens, images, ...) whose results have the dtype of images."""
    return in_float32(function, like=1)


class _PatchVelocity(KernelFunction):
    """Backward saves only t, except for a gradient of t, which the reference computes."""

    op = "patch_velocity"
    unsaved_samples = ("tokens", "images")
    samples = ("tokens", "images", "t")
    by_reference = ("t",)

    @staticmethod
    @_as_images
    def reference(tokens: Tensor, images: Tensor, t: Tensor, floor: float) -> tuple[Tensor, ...]:
        return (reference.patch_velocity(tokens, images, t, floor),)

    @staticmethod
    def fake(tokens: Tensor, images: Tensor, t: Tensor, floor: float) -> Tensor:
        return images.new_empty(images.shape)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        grad, found = grads.y, {}
        if needed.tokens:
            found = _PatchVelocityBackward.by_name(grad, args.tokens, args.t, args.floor)
        if needed.images and grad.dtype == args.t.dtype:
            found["images"] = grad / args.t.clamp(args.floor, 1.0)[:, None, None, None]
        elif needed.images:  # v is linear in them, and PyTorch would round and store the float32 quotient
            none = args.tokens.new_zeros(()).expand(len(grad), *args.tokens.shape[1:])
            found["images"] = patch_velocity(none, grad, args.t, args.floor)
        return found

    @classmethod
    def tangent(cls, args: Any, tangents: Any) -> Any:
        tokens, images, t, floor = args
        tokens_t, images_t, t_t, _ = tangents
        return (patch_velocity_jvp(tokens, images, t, tokens_t, images_t, t_t, floor)[1],)


class _PatchVelocityBackward(Gradients):
    """(grad, tokens with zero samples, t, floor) -> the gradient of the tokens."""

    of = _PatchVelocity
    op = "patch_velocity_backward"
    outputs = ("tokens",)

    @staticmethod
    def reference(grad: Tensor, tokens: Tensor, t: Tensor, floor: float) -> tuple[Tensor, ...]:
        like = tokens.new_zeros((grad.shape[0], *tokens.shape[1:]))
        args = like, torch.zeros_like(grad), t, floor
        return reference_gradients(_PatchVelocity, _PatchVelocityBackward.outputs, (grad,), *args)

    @classmethod
    def fake(cls, grad: Tensor, tokens: Tensor, t: Tensor, floor: float) -> Tensor:
        return tokens.new_empty((grad.shape[0], *tokens.shape[1:]))


class _PatchVelocityJvp(JvpFunction):
    value = _PatchVelocity
    op = "patch_velocity_jvp"
    outputs = ("y", "y_t")
    samples = ("tokens", "images", "t", "tokens_t", "images_t", "t_t")

    @staticmethod
    @_as_images
    def reference(
        tokens: Tensor,
        images: Tensor,
        t: Tensor,
        tokens_t: Tensor,
        images_t: Tensor,
        t_t: Tensor,
        floor: float,
    ) -> tuple[Tensor, ...]:
        return reference.patch_velocity_jvp(tokens, images, t, tokens_t, images_t, t_t, floor)

    @staticmethod
    def fake(
        tokens: Tensor,
        images: Tensor,
        t: Tensor,
        tokens_t: Tensor,
        images_t: Tensor,
        t_t: Tensor,
        floor: float,
    ) -> tuple[Tensor, ...]:
        return images.new_empty(images.shape), images.new_empty(images_t.shape)


register("patch_velocity", _PatchVelocity)
register("patch_velocity_backward", _PatchVelocityBackward)
register("patch_velocity_jvp", _PatchVelocityJvp)
register("patch_velocity_jvp_detached", detached(_PatchVelocityJvp))
