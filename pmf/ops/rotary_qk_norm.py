"""Per-head RMSNorm of queries and keys, then rotary embedding, in one pass over both."""

from typing import Any

import torch
from torch import Tensor

from pmf import reference

from ._autograd import Gradients, JvpFunction, KernelFunction, detached
from ._dispatch import call, register
from ._inputs import autocast_widest, check_constant, check_tangents, zeros
from ._plain import in_float32
from ._subclasses import operation

__all__ = ["rotary_qk_norm", "rotary_qk_norm_jvp"]

LAYOUTS = {
    "query": "b h _ _",
    "key": "b h _ _",
    "query_weight": "_",
    "key_weight": "_",
    "cos": "_ _",
    "sin": "_ _",
}


@operation(LAYOUTS, "b h _ _", "b h _ _")
def rotary_qk_norm(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys per head and rotate the pairs of the last P tokens by their angles.

        n = weight x / sqrt(mean x^2 + eps)      (a, b) -> (a cos - b sin, a sin + b cos)

    Adjacent elements of n form a pair (a, b). The first N - P tokens are normalised but not rotated.

    Args:
        query: [B, H, N, D] with D even; key: [B, Hk, N, D]; float32, bfloat16, float16 or float64; any
            strides.
        query_weight, key_weight: [D], in query's dtype.
        cos, sin: [P, D/2] with P <= N, of any floating dtype.

    Returns (query, key) in their shapes, dtype and memory layouts, computed in float32 (float64 for float64).

    Raises ValueError if shapes or dtypes do not fit. torch.autograd.forward_ad inside torch.compile
    raises RuntimeError: use `rotary_qk_norm_jvp`. Source: Su et al., "RoFormer" (2021); per-head norms:
    Henry et al. (2020).
    """
    check_constant("rotary_qk_norm", "eps", eps)
    query, key, query_weight, key_weight = autocast_widest(2, query, key, query_weight, key_weight)
    return call("rotary_qk_norm", query, key, query_weight, key_weight, cos, sin, eps)


@operation(LAYOUTS, "b h _ _", "b h _ _", "b h _ _", "b h _ _")
def rotary_qk_norm_jvp(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_t: Tensor | None,
    key_t: Tensor | None,
    eps: float = 1e-6,
    *,
    detach_tangent: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rotary_qk_norm` and its tangent in one pass: the rotation is linear, so it applies to both alike.

        u = x s,  g = tx s,  s = rsqrt(mean x^2 + eps)      tn = weight (g - u mean(u g)), then rotated

    Args:
        query, key, query_weight, key_weight, cos, sin: as for `rotary_qk_norm`.
        query_t, key_t: tangents, or None for zero; for all samples (dimension 0) or the first n.
        detach_tangent: treat the tangents as constants for autograd, so that backward costs the same as
            `rotary_qk_norm`'s. Required if n is smaller than the batch and gradients are needed.

    Returns (query, key, query_t, key_t), the tangents for n samples. All are differentiable unless detached.

    Raises ValueError like `rotary_qk_norm`, and if tangents do not fit.
    """
    check_constant("rotary_qk_norm_jvp", "eps", eps)
    query, key, query_weight, key_weight, query_t, key_t = autocast_widest(
        2, query, key, query_weight, key_weight, query_t, key_t
    )
    count = check_tangents(
        "rotary_qk_norm_jvp",
        [("query_t", query, query_t), ("key_t", key, key_t)],
        detach_tangent,
        (query_weight, key_weight, cos, sin),
    )
    if count is None:
        q, k = rotary_qk_norm(query, key, query_weight, key_weight, cos, sin, eps)
        return q, k, torch.zeros_like(q), torch.zeros_like(k)
    query_t = zeros(query, count) if query_t is None else query_t
    key_t = zeros(key, count) if key_t is None else key_t
    op = "rotary_qk_norm_jvp_detached" if detach_tangent else "rotary_qk_norm_jvp"
    return call(op, query, key, query_weight, key_weight, cos, sin, query_t, key_t, None, None, eps)


class _RotaryQkNorm(KernelFunction):
    op = "rotary_qk_norm"
    outputs = ("query", "key")
    samples = ("query", "key")
    by_reference = ("cos", "sin")

    @staticmethod
    @in_float32
    def reference(
        query: Tensor,
        key: Tensor,
        query_weight: Tensor,
        key_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        eps: float,
    ) -> tuple[Tensor, ...]:
        return reference.rotary_qk_norm(query, key, query_weight, key_weight, cos, sin, eps)

    @staticmethod
    def fake(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return torch.empty_like(query), torch.empty_like(key)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        grad_query = zeros(args.query) if grads.query is None else grads.query
        grad_key = zeros(args.key) if grads.key is None else grads.key
        return _RotaryQkNormBackward.by_name(grad_query, grad_key, *args)

    @classmethod
    def tangent(cls, args: Any, tangents: Any) -> Any:
        *inputs, eps = args
        query_t = zeros(args.query) if tangents.query is None else tangents.query
        key_t = zeros(args.key) if tangents.key is None else tangents.key
        weights_t = tangents.query_weight, tangents.key_weight
        return call("rotary_qk_norm_jvp", *inputs, query_t, key_t, *weights_t, eps)[2:]


class _RotaryQkNormBackward(Gradients):
    of = _RotaryQkNorm
    op = "rotary_qk_norm_backward"
    outputs = ("query", "key", "query_weight", "key_weight")


class _RotaryQkNormJvp(JvpFunction):
    value = _RotaryQkNorm
    op = "rotary_qk_norm_jvp"
    outputs = ("query", "key", "query_t", "key_t")
    samples = ("query", "key", "query_t", "key_t")
    by_reference = ("cos", "sin")

    @staticmethod
    @in_float32
    def reference(
        query: Tensor,
        key: Tensor,
        query_weight: Tensor,
        key_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        query_t: Tensor,
        key_t: Tensor,
        query_weight_t: Tensor | None,
        key_weight_t: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, ...]:
        q, k, q_t, k_t = reference.rotary_qk_norm_jvp(
            query, key, query_weight, key_weight, cos, sin, query_t, key_t, eps
        )
        if query_weight_t is None and key_weight_t is None:
            return q, k, q_t, k_t
        # The op is linear in the weights: substituting their tangents gives the missing terms.
        none = torch.zeros_like(query_weight)
        query_weight_t = none if query_weight_t is None else query_weight_t
        key_weight_t = none if key_weight_t is None else key_weight_t
        more = reference.rotary_qk_norm(query, key, query_weight_t, key_weight_t, cos, sin, eps)
        return q, k, q_t + more[0], k_t + more[1]

    @staticmethod
    def fake(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in (query, key, rest[4], rest[5]))

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        grad_query_t = zeros(args.query_t) if grads.query_t is None else grads.query_t
        grad_key_t = zeros(args.key_t) if grads.key_t is None else grads.key_t
        return _RotaryQkNormJvpBackward.by_name(grads.query, grads.key, grad_query_t, grad_key_t, *args)


class _RotaryQkNormJvpBackward(Gradients):
    of = _RotaryQkNormJvp
    op = "rotary_qk_norm_jvp_backward"
    outputs = (*_RotaryQkNormBackward.outputs, "query_t", "key_t", "query_weight_t", "key_weight_t")


register("rotary_qk_norm", _RotaryQkNorm)
register("rotary_qk_norm_backward", _RotaryQkNormBackward)
register("rotary_qk_norm_jvp", _RotaryQkNormJvp)
register("rotary_qk_norm_jvp_backward", _RotaryQkNormJvpBackward)
register("rotary_qk_norm_jvp_detached", detached(_RotaryQkNormJvp))
