"""Per-head RMSNorm of queries and keys, then rotary embedding, in one pass over both."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from pmf import reference

from ._autograd import KernelFunction, call, in_float32, register, vjp
from ._inputs import autocast_widest, check_tangents, zeros
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
    """Normalise queries and keys per head and turn the last P tokens' pairs by their angles.

        n = weight x / sqrt(mean x^2 + eps)      (a, b) -> (a cos - b sin, a sin + b cos)

    Adjacent elements of n form a pair (a, b). The first N - P tokens are normalised and not rotated.

    Args:
        query: [B, H, N, D] with D even; key: [B, Hk, N, D]; float32, bfloat16, float16 or float64; any
            strides.
        query_weight, key_weight: [D], in query's dtype.
        cos, sin: [P, D/2] with P <= N, of any floating dtype.

    Returns (query, key) in their shapes, dtype and memory layouts, computed in float32 (float64 for float64).

    Raises ValueError where shapes or dtypes do not fit. torch.autograd.forward_ad inside torch.compile
    raises RuntimeError: use `rotary_qk_norm_jvp`. Source: Su et al., "RoFormer" (2021); per-head norms:
    Henry et al. (2020).
    """
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
    """`rotary_qk_norm` and its tangent in one pass: the rotation is linear, so both take the same.

    Args:
        query, key, query_weight, key_weight, cos, sin: as for `rotary_qk_norm`.
        query_t, key_t: tangents, or None for zero; of all samples (dimension 0) or of the first n.
        detach_tangent: the tangents are constants for autograd, and backward costs what `rotary_qk_norm`'s
            does. Needed where n is smaller than the batch and gradients are wanted.

    Returns (query, key, query_t, key_t), the tangents of n samples. All are differentiable unless detached.
    """
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
    samples: ClassVar[tuple[int, ...]] = (0, 1)
    by_reference: ClassVar[tuple[int, ...]] = (4, 5)

    @staticmethod
    @in_float32
    def reference(*args: Any) -> tuple[Tensor, ...]:
        return reference.rotary_qk_norm(*args)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        grads = (zeros(x) if g is None else g for x, g in zip(args, grads, strict=False))
        return (*_RotaryQkNormBackward.apply(*grads, *args), None, None, None)

    @classmethod
    def tangent(cls, args: Any, tangents: Any) -> Any:
        *inputs, eps = args
        query_t, key_t = (zeros(x) if t is None else t for x, t in zip(args[:2], tangents[:2], strict=True))
        return call("rotary_qk_norm_jvp", *inputs, query_t, key_t, tangents[2], tangents[3], eps)[2:]


class _RotaryQkNormBackward(KernelFunction):
    op = "rotary_qk_norm_backward"

    @staticmethod
    def reference(grad_query: Tensor, grad_key: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return vjp(_RotaryQkNorm.reference, args, (grad_query, grad_key))[:4]


class _RotaryQkNormJvp(KernelFunction):
    """(query, key, weights, cos, sin, query_t, key_t, weights' tangents or None, eps) -> (q, k, tq, tk)."""

    op = "rotary_qk_norm_jvp"
    samples: ClassVar[tuple[int, ...]] = (0, 1, 6, 7)
    by_reference: ClassVar[tuple[int, ...]] = (4, 5)

    @staticmethod
    @in_float32
    def reference(*args: Any) -> tuple[Tensor, ...]:
        query, key, query_weight, key_weight, cos, sin, query_t, key_t, query_weight_t, key_weight_t, eps = (
            args
        )
        outputs = reference.rotary_qk_norm_jvp(
            query, key, query_weight, key_weight, cos, sin, query_t, key_t, eps
        )
        if query_weight_t is None and key_weight_t is None:
            return outputs
        # The op is linear in the weights: their tangents in their place give the missing terms.
        none = torch.zeros_like(query_weight)
        more = reference.rotary_qk_norm(
            query,
            key,
            none if query_weight_t is None else query_weight_t,
            none if key_weight_t is None else key_weight_t,
            cos,
            sin,
            eps,
        )
        return outputs[0], outputs[1], outputs[2] + more[0], outputs[3] + more[1]

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        if grads[2] is None and grads[3] is None:
            return _RotaryQkNormJvpDetached.gradient(grads, args, residuals, needed)
        grad_query_t, grad_key_t = (
            zeros(x) if g is None else g for x, g in zip(args[6:8], grads[2:], strict=True)
        )
        found = _RotaryQkNormJvpBackward.apply(*grads[:2], grad_query_t, grad_key_t, *args)
        return (*found[:4], None, None, *found[4:], None)


class _RotaryQkNormJvpBackward(KernelFunction):
    op = "rotary_qk_norm_jvp_backward"

    @staticmethod
    def reference(*args: Any) -> tuple[Tensor, ...]:
        found = vjp(_RotaryQkNormJvp.reference, args[4:], args[:4])
        return tuple(args[2].new_empty(0) if found[i] is None else found[i] for i in (0, 1, 2, 3, 6, 7, 8, 9))


class _RotaryQkNormJvpDetached(_RotaryQkNormJvp):
    constants = 2
    unsaved: ClassVar[tuple[int, ...]] = (6, 7, 8, 9)

    @staticmethod
    def reference(*args: Any) -> tuple[Tensor, ...]:
        return _RotaryQkNormJvp.reference(*args)[:2]

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        found = _RotaryQkNorm.gradient(grads[:2], (*args[:6], args[-1]), (), needed)
        return (*found[:6], None, None, None, None, None)

    @classmethod
    def tangent(cls, args: Any, tangents: Any) -> Any:
        return _RotaryQkNorm.tangent((*args[:6], args[-1]), tangents[:6])


def _fake(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(query), torch.empty_like(key)


def _fake_backward(grad_query: Tensor, grad_key: Tensor, *args: Any) -> tuple[Tensor, ...]:
    query, key, query_weight, key_weight = args[:4]
    return torch.empty_like(query), torch.empty_like(key), _vector(query_weight), _vector(key_weight)


def _fake_jvp(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in (query, key, rest[4], rest[5]))


def _fake_jvp_backward(*args: Any) -> tuple[Tensor, ...]:
    query, key, query_weight, key_weight, _, _, query_t, key_t, query_weight_t, key_weight_t, _ = args[4:]
    return (
        *_fake_backward(args[2], args[3], query, key, query_weight, key_weight),
        torch.empty_like(query_t),
        torch.empty_like(key_t),
        query_weight.new_empty(0) if query_weight_t is None else _vector(query_weight),
        key_weight.new_empty(0) if key_weight_t is None else _vector(key_weight),
    )


def _vector(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


register("rotary_qk_norm", _RotaryQkNorm, _fake)
register("rotary_qk_norm_backward", _RotaryQkNormBackward, _fake_backward)
register("rotary_qk_norm_jvp", _RotaryQkNormJvp, _fake_jvp)
register("rotary_qk_norm_jvp_backward", _RotaryQkNormJvpBackward, _fake_jvp_backward)
register("rotary_qk_norm_jvp_detached", _RotaryQkNormJvpDetached)
