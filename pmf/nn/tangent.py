"""The layers' operations on a value and its tangent.

A network that is differentiated along a direction during training passes two buffers from layer to layer: the
value of every sample, and the tangent of the samples that need one. By convention those are the FIRST n
samples:

    f(x, x_t) -> (y, y_t)      x, y [B, ...]      x_t, y_t [n, ...] with n <= B, or None (no sample has one)

The tangent is a constant for autograd: du/dt is under a stop-gradient in the MeanFlow identity, so nothing is
saved for a backward pass through it.

Why two buffers rather than one of B + n samples with one matrix product for both? The tensors that backward
saves for the value would then keep the tangent's rows in memory too: half as much again if half of the
samples carry a tangent. And joining the rows would gain little: each product is large enough by itself.
Everything else is joined: every kernel reads value and tangent in one pass (the `_jvp` ops), and the branches
of a block are a single function of both (`pmf.nn.attention`, `pmf.nn.mlp`).
"""

import torch
from torch import Tensor, nn

from pmf import ops
from pmf.ops import _products as products

__all__ = ["linear", "patch_embed", "rms_norm"]

Pair = tuple[Tensor, Tensor | None]


def linear(layer: nn.Linear, x: Tensor, x_t: Tensor | None) -> Pair:
    """y = W x + b, ty = W tx."""
    y = products.linear(x, layer.weight, layer.bias)
    if x_t is None:
        return y, None
    with torch.no_grad():
        return y, products.linear(x_t, layer.weight)


def rms_norm(x: Tensor, weight: Tensor, x_t: Tensor | None, eps: float) -> Pair:
    """`pmf.ops.rms_norm` and its tangent; x [B, ..., D], weight [D]."""
    if x_t is None:
        return ops.rms_norm(x, weight, eps), None
    return ops.rms_norm_jvp(x, weight, x_t, eps=eps, detach_tangent=True)


def patch_embed(
    images: Tensor,
    weight_down: Tensor,
    bias_down: Tensor,
    weight_up: Tensor,
    bias_up: Tensor,
    position: Tensor,
    prefix: Tensor,
    images_t: Tensor | None,
    prefix_t: Tensor | None,
) -> Pair:
    """`pmf.ops.patch_embed` and its tangent; images [B, C, H, W], prefix [B, P, D], position [P + N, D]."""
    weights = weight_down, bias_down, weight_up, bias_up
    if images_t is None or prefix_t is None:
        return ops.patch_embed(images, *weights, position, prefix), None
    return ops.patch_embed_jvp(images, *weights, position, prefix, images_t, prefix_t, detach_tangent=True)
