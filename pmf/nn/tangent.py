"""The layers' operations on a value and, beside it, its tangent.

A network that is differentiated along a direction in the middle of training carries two buffers from layer to
layer: the value of every sample, and the tangent of the samples that need one. By convention those are the
FIRST n samples:

    f(x, x_t) -> (y, y_t)      x, y [B, ...]      x_t, y_t [n, ...] with n <= B, or None (no sample has one)

The tangent is a constant for autograd: du/dt stands under a stop-gradient in the MeanFlow identity, so
nothing is saved for a backward pass through it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmf import ops

__all__ = ["attention", "gated_residual", "linear", "patch_embed", "rms_norm", "rotary_qk_norm", "swiglu"]

Pair = tuple[Tensor, Tensor | None]


def linear(layer: nn.Linear, x: Tensor, x_t: Tensor | None) -> Pair:
    """y = W x + b, ty = W tx."""
    y = F.linear(x, layer.weight, layer.bias)
    if x_t is None:
        return y, None
    with torch.no_grad():
        return y, F.linear(x_t, layer.weight)


def rms_norm(x: Tensor, weight: Tensor, x_t: Tensor | None, eps: float) -> Pair:
    """`pmf.ops.rms_norm` and its tangent; x [B, ..., D], weight [D]."""
    if x_t is None:
        return ops.rms_norm(x, weight, eps), None
    return ops.rms_norm_jvp(x, weight, x_t, eps=eps, detach_tangent=True)


def swiglu(gate: Tensor, up: Tensor, gate_t: Tensor | None, up_t: Tensor | None) -> Pair:
    """`pmf.ops.swiglu` and its tangent; gate, up [B, ..., D]."""
    if gate_t is None or up_t is None:
        return ops.swiglu(gate, up), None
    return ops.swiglu_jvp(gate, up, gate_t, up_t, detach_tangent=True)


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor, x_t: Tensor | None, branch_t: Tensor | None
) -> Pair:
    """`pmf.ops.gated_residual` and its tangent; x, branch [B, ..., D], gate [D]."""
    if x_t is None or branch_t is None:
        return ops.gated_residual(x, branch, gate), None
    return ops.gated_residual_jvp(x, branch, gate, x_t, branch_t, detach_tangent=True)


def rotary_qk_norm(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_t: Tensor | None,
    key_t: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`pmf.ops.rotary_qk_norm` and its tangent; query, key [B, H, N, D]."""
    inputs = query, key, query_weight, key_weight, cos, sin
    if query_t is None or key_t is None:
        return *ops.rotary_qk_norm(*inputs, eps), None, None
    return ops.rotary_qk_norm_jvp(*inputs, query_t, key_t, eps, detach_tangent=True)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
) -> Pair:
    """`pmf.ops.attention` and its tangent; query, key, value [B, H, N, D]."""
    if query_t is None:
        return ops.attention(query, key, value), None
    return ops.attention_jvp(query, key, value, query_t, key_t, value_t, detach_tangent=True)


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
    return ops.patch_embed_jvp(images, *weights, images_t, position, prefix, prefix_t, detach_tangent=True)
