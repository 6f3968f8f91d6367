"""The layers' operations on a value and, beside it, its tangent.

A network that is differentiated along a direction in the middle of training carries two buffers from layer to
layer: the value of every sample, and the tangent of the samples that need one. By convention those are the
FIRST n samples:

    f(x, x_t) -> (y, y_t)      x, y [B, ...]      x_t, y_t [n, ...] with n <= B, or None (no sample has a
    tangent)

The tangent is a constant for autograd: du/dt stands under a stop-gradient in the MeanFlow identity, so
nothing is saved for a backward pass through it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmf import reference as ops

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
    y = ops.rms_norm(x, weight, eps)
    if x_t is None:
        return y, None
    with torch.no_grad():
        return y, ops.rms_norm_jvp(x[: len(x_t)], weight, x_t, eps=eps)[1]


def swiglu(gate: Tensor, up: Tensor, gate_t: Tensor | None, up_t: Tensor | None) -> Pair:
    """`pmf.ops.swiglu` and its tangent; gate, up [B, ..., D]."""
    y = ops.swiglu(gate, up)
    if gate_t is None or up_t is None:
        return y, None
    n = len(gate_t)
    with torch.no_grad():
        return y, ops.swiglu_jvp(gate[:n], up[:n], gate_t, up_t)[1]


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor, x_t: Tensor | None, branch_t: Tensor | None
) -> Pair:
    """`pmf.ops.gated_residual` and its tangent; x, branch [B, ..., D], gate [D]."""
    y = ops.gated_residual(x, branch, gate)
    if x_t is None or branch_t is None:
        return y, None
    n = len(x_t)
    with torch.no_grad():
        return y, ops.gated_residual_jvp(x[:n], branch[:n], gate, x_t, branch_t)[1]


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
    q, k = ops.rotary_qk_norm(query, key, query_weight, key_weight, cos, sin, eps)
    if query_t is None or key_t is None:
        return q, k, None, None
    n = len(query_t)
    with torch.no_grad():
        _, _, q_t, k_t = ops.rotary_qk_norm_jvp(
            query[:n], key[:n], query_weight, key_weight, cos, sin, query_t, key_t, eps
        )
    return q, k, q_t, k_t


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
) -> Pair:
    """`pmf.ops.attention` and its tangent; query, key, value [B, H, N, D]."""
    out = ops.attention(query, key, value)
    if query_t is None:
        return out, None
    n = len(query_t)
    with torch.no_grad():
        return out, ops.attention_jvp(query[:n], key[:n], value[:n], query_t, key_t, value_t)[1]


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
    tokens = ops.patch_embed(images, weight_down, bias_down, weight_up, bias_up, position, prefix)
    if images_t is None or prefix_t is None:
        return tokens, None
    with torch.no_grad():
        # The map is affine: its tangent is the same map without biases and position.
        return tokens, ops.patch_embed(images_t, weight_down, None, weight_up, None, None, prefix_t)
