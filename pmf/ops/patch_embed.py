"""Images to tokens through a bottleneck, written after the prefix tokens in one buffer."""

import functools
from typing import Any

import torch
from torch import Tensor

from pmf import reference

from ._autograd import Gradients, JvpFunction, KernelFunction, detached, named, reference_gradients
from ._dispatch import call, register, register_fake
from ._inputs import autocast_matmul, check_tangents, zeros
from ._plain import in_float32
from ._subclasses import operation

__all__ = ["patch_embed", "patch_embed_jvp"]

LAYOUTS = {
    "images": "b _ _ _",
    "weight_down": "_ _ _ _",
    "bias_down": "_",
    "weight_up": "_ _",
    "bias_up": "_",
    "position": "_ _",
    "prefix": "b _ _",
}


@operation(LAYOUTS, "b _ _")
def patch_embed(
    images: Tensor,
    weight_down: Tensor,
    bias_down: Tensor | None,
    weight_up: Tensor,
    bias_up: Tensor | None,
    position: Tensor | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    """Bottleneck patch embedding.

        tokens = W_up (W_down patches + b_down) + b_up + position, after the prefix

    Args:
        images: [B, C, H, W], H and W multiples of the patch size p; in the dtype of the weights, or float32
            with 16-bit weights, in which case pixels are rounded as they are read, without a copy.
        weight_down: [R, C, p, p]; bias_down: [R] or None; float32, bfloat16, float16 or float64, like the
            rest.
        weight_up: [D, R]; bias_up: [D] or None.
        position: [n, D], added to the last n tokens: n = N for the image tokens only, P + N for all.
        prefix: [B, P, D], tokens to prepend.

    Returns tokens [B, P + N, D] with N = (H / p) (W / p), row by row, in the dtype of the weights.

    Raises ValueError if shapes or dtypes do not fit. torch.autograd.forward_ad inside torch.compile
    raises RuntimeError: use `patch_embed_jvp`. Source: Li and He, "Back to Basics: Let Denoising
    Generative Models Denoise" (2025).
    """
    args = autocast_matmul(weight_down, bias_down, weight_up, bias_up, position, prefix)
    return call("patch_embed", *_autocast_pixels(images), *args)[0]


@operation(LAYOUTS, "b _ _", "b _ _")
def patch_embed_jvp(
    images: Tensor,
    weight_down: Tensor,
    bias_down: Tensor | None,
    weight_up: Tensor,
    bias_up: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    images_t: Tensor | None,
    prefix_t: Tensor | None = None,
    *,
    detach_tangent: bool = False,
) -> tuple[Tensor, Tensor]:
    """`patch_embed` and its tangent in one batch: the map is affine, its tangent the map without biases.

        ttokens = W_up W_down tpatches, after tprefix

    Args:
        images, weight_down, bias_down, weight_up, bias_up, position, prefix: as for `patch_embed`.
        images_t, prefix_t: tangents, or None for zero; for all samples (dimension 0) or the first n.
        detach_tangent: treat the tangent as a constant for autograd, so that backward costs the same as
            `patch_embed`'s. Required if n is smaller than the batch and gradients are needed.

    Returns (tokens, tokens_t), tokens_t for n samples. Both are differentiable unless detached.

    Raises ValueError like `patch_embed`, and if tangents do not fit.
    """
    images, images_t = _autocast_pixels(images, images_t)
    weight_down, bias_down, weight_up, bias_up, position, prefix, prefix_t = autocast_matmul(
        weight_down, bias_down, weight_up, bias_up, position, prefix, prefix_t
    )
    pairs = [("images_t", images, images_t)]
    if prefix is not None:
        pairs.append(("prefix_t", prefix, prefix_t))
    elif prefix_t is not None:
        raise ValueError("patch_embed_jvp: prefix_t needs a prefix")
    count = check_tangents(
        "patch_embed_jvp", pairs, detach_tangent, (weight_down, bias_down, weight_up, bias_up, position)
    )
    if count is None:
        tokens = patch_embed(images, weight_down, bias_down, weight_up, bias_up, position, prefix)
        return tokens, torch.zeros_like(tokens)
    images_t = zeros(images, count) if images_t is None else images_t
    op = "patch_embed_jvp_detached" if detach_tangent else "patch_embed_jvp"
    args = (images, weight_down, bias_down, weight_up, bias_up, position, prefix, images_t, prefix_t)
    return call(op, *args)[:2]


def _autocast_pixels(*images: Tensor | None) -> tuple[Any, ...]:
    """Autocast leaves float32 pixels unchanged: with 16-bit weights they are rounded as they are read."""
    wide = all(x is None or x.dtype == torch.float32 for x in images)
    return images if wide else autocast_matmul(*images)


_in_float32 = functools.partial(in_float32, like=1)  # tokens have the weights' dtype


class _PatchEmbed(KernelFunction):
    op = "patch_embed"
    outputs = ("tokens", "hidden")
    constants = ("hidden",)
    residuals = ("hidden",)
    samples = ("images", "prefix")

    @staticmethod
    @_in_float32
    def reference(
        images: Tensor,
        weight_down: Tensor,
        bias_down: Tensor | None,
        weight_up: Tensor,
        bias_up: Tensor | None,
        position: Tensor | None,
        prefix: Tensor | None,
    ) -> tuple[Tensor, ...]:
        return (reference.patch_embed(images, weight_down, bias_down, weight_up, bias_up, position, prefix),)

    @classmethod
    def fake(cls, *args: Any) -> tuple[Tensor, ...]:
        images, weight_down, _, weight_up, _, _, prefix = args
        return _tokens(images, weight_down, weight_up, prefix), _hidden(images, weight_down)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        return _PatchEmbedBackward.by_name(grads.tokens, residuals.hidden, needed.images, *args)

    @classmethod
    def tangent(cls, args: Any, tangents: Any) -> Any:
        # The op is linear in the images and the prefix; the weights' tangents come from the reference.
        if any(t is not None for t in tangents._replace(images=None, prefix=None)):
            return super().tangent(args, tangents)
        images, prefix = args.images, args.prefix
        images_t = torch.zeros_like(images) if tangents.images is None else tangents.images
        no_prefix_t = prefix is not None and tangents.prefix is None
        prefix_t = torch.zeros_like(prefix) if no_prefix_t else tangents.prefix
        return (patch_embed(images_t, args.weight_down, None, args.weight_up, None, None, prefix_t),)


class _PatchEmbedBackward(Gradients):
    """(grad, hidden, whether images need a gradient, arguments) -> gradients; that of None is empty.

    It takes more arguments than the kernel (the biases), because a second derivative flows through hidden to
    all of them.
    """

    of = _PatchEmbed
    outputs = _PatchEmbed.Arguments._fields
    Arguments = named("grad", "hidden", "need", *outputs)

    @classmethod
    def forward(cls, grad: Tensor, hidden: Tensor, need: bool, *args: Any) -> tuple[Tensor, ...]:
        w = _PatchEmbed.Arguments(*args)
        images, *weights, position = torch.ops.pmf.patch_embed_backward(
            grad, w.images, w.weight_down, w.weight_up, hidden, need
        )
        return images, *weights, _last_rows(position, w.position), _first_tokens(grad, w.prefix)

    @staticmethod
    def reference(grad: Tensor, hidden: Tensor, need: bool, *args: Any) -> tuple[Tensor, ...]:
        images, *rest = reference_gradients(_PatchEmbed, _PatchEmbedBackward.outputs, (grad,), *args)
        return images if need else grad.new_empty(0), *rest


class _PatchEmbedJvp(JvpFunction):
    value = _PatchEmbed
    op = "patch_embed_jvp"
    outputs = ("tokens", "tokens_t", "hidden", "hidden_t")
    constants = ("hidden", "hidden_t")
    residuals = ("hidden", "hidden_t")
    samples = ("images", "prefix", "images_t", "prefix_t")

    @staticmethod
    @_in_float32
    def reference(
        images: Tensor,
        weight_down: Tensor,
        bias_down: Tensor | None,
        weight_up: Tensor,
        bias_up: Tensor | None,
        position: Tensor | None,
        prefix: Tensor | None,
        images_t: Tensor,
        prefix_t: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights = weight_down, bias_down, weight_up, bias_up, position
        return reference.patch_embed_jvp(images, *weights, prefix, images_t, prefix_t)

    @classmethod
    def fake(cls, *args: Any) -> tuple[Tensor, ...]:
        *value, images_t, _ = args
        tokens, hidden = _PatchEmbed.fake(*value)
        count = images_t.shape[0]
        return tokens, tokens[:count].clone(), hidden, hidden[:count].clone()

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        return _PatchEmbedJvpBackward.by_name(*grads, *residuals, needed.images or needed.images_t, *args)


class _PatchEmbedJvpBackward(Gradients):
    """Like `_PatchEmbedBackward`; also takes whether images or their tangents need gradients."""

    of = _PatchEmbedJvp
    outputs = _PatchEmbedJvp.Arguments._fields
    Arguments = named("grad", "grad_t", "hidden", "hidden_t", "need", *outputs)

    @classmethod
    def forward(
        cls, grad: Tensor | None, grad_t: Tensor, hidden: Tensor, hidden_t: Tensor, need: bool, *args: Any
    ) -> tuple[Tensor, ...]:
        w = _PatchEmbedJvp.Arguments(*args)
        images, images_t, *weights, position = torch.ops.pmf.patch_embed_jvp_backward(
            grad, grad_t, w.images, w.images_t, w.weight_down, w.weight_up, hidden, hidden_t, need
        )
        prefix = _first_tokens(zeros(grad_t) if grad is None else grad, w.prefix)
        position = _last_rows(position, w.position)
        return images, *weights, position, prefix, images_t, _first_tokens(grad_t, w.prefix_t)

    @staticmethod
    def reference(
        grad: Tensor | None, grad_t: Tensor, hidden: Any, hidden_t: Any, need: bool, *args: Any
    ) -> tuple[Tensor, ...]:
        names = _PatchEmbedJvpBackward.outputs
        found = dict(
            zip(names, reference_gradients(_PatchEmbedJvp, names, (grad, grad_t), *args), strict=True)
        )
        if not need:
            found["images"], found["images_t"] = grad_t.new_empty(0), grad_t.new_empty(0)
        return tuple(found.values())


def _last_rows(grad: Tensor, position: Tensor | None) -> Tensor:
    """The gradient of position [n, D] within that of all tokens [P + N, D]; a separate tensor."""
    return grad.new_empty(0) if position is None else grad[grad.shape[0] - position.shape[0] :].clone()


def _first_tokens(grad: Tensor, prefix: Tensor | None) -> Tensor:
    """The gradient of prefix [B, P, D] within that of all tokens; a separate tensor."""
    return grad.new_empty(0) if prefix is None else grad[:, : prefix.shape[1]].clone()


def _fake_backward(
    grad: Tensor, images: Tensor, weight_down: Tensor, weight_up: Tensor, hidden: Tensor, need: bool
) -> tuple[Tensor, ...]:
    return _image_grad(images, need), *_weight_grads(grad, weight_down, weight_up)


def _fake_jvp_backward(
    grad: Tensor | None,
    grad_t: Tensor,
    images: Tensor,
    images_t: Tensor,
    weight_down: Tensor,
    weight_up: Tensor,
    hidden: Tensor,
    hidden_t: Tensor,
    need: bool,
) -> tuple[Tensor, ...]:
    return (
        _image_grad(images, need),
        _image_grad(images_t, need),
        *_weight_grads(grad_t, weight_down, weight_up),
    )


def _tokens(images: Tensor, weight_down: Tensor, weight_up: Tensor, prefix: Tensor | None) -> Tensor:
    count = 0 if prefix is None else prefix.shape[1]
    return weight_up.new_empty(
        (images.shape[0], count + _hidden(images, weight_down).shape[1], weight_up.shape[0])
    )


def _hidden(images: Tensor, weight_down: Tensor) -> Tensor:
    batch, _, height, width = images.shape
    patch = weight_down.shape[-1]
    return weight_down.new_empty((batch, (height // patch) * (width // patch), weight_down.shape[0]))


def _image_grad(images: Tensor, need: bool) -> Tensor:
    return images.new_empty(images.shape if need else 0)


def _weight_grads(grad: Tensor, weight_down: Tensor, weight_up: Tensor) -> tuple[Tensor, ...]:
    width, rank = weight_up.shape
    shapes: tuple[Any, ...] = (weight_down.shape, (rank,), weight_up.shape, (width,), (grad.shape[1], width))
    return tuple(weight_up.new_empty(shape) for shape in shapes)


register("patch_embed", _PatchEmbed)
register("patch_embed_jvp", _PatchEmbedJvp)
register("patch_embed_jvp_detached", detached(_PatchEmbedJvp))
register_fake("patch_embed_backward", _fake_backward)
register_fake("patch_embed_jvp_backward", _fake_jvp_backward)
