"""Scaled dot-product attention, with its tangent, in memory linear in the sequence length."""

import functools
from typing import Any

import torch
from torch import Tensor

from pmf import _library, reference
from pmf.reference.attention import Window

from ._attention_inputs import Options, causal_bias, make_plan, sides
from ._autograd import Gradients, JvpFunction, KernelFunction, detached, pick, reference_gradients
from ._dispatch import call, plain, register
from ._inputs import autocast_matmul, check_flags, check_tangents, is_differentiable
from ._plain import in_float32
from ._subclasses import operation

__all__ = ["attention", "attention_jvp"]

LAYOUTS = {
    "query": "* _ _",
    "key": "* _ _",
    "value": "* _ _",
    "attn_mask": "* _ _",
}


@operation(LAYOUTS, "* _ _", "* _")
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = (None, None),
    return_lse: bool = False,
) -> Any:
    """Attention with the arguments of `torch.nn.functional.scaled_dot_product_attention`.

        O = softmax(scale Q K^T + mask) V

    Args:
        query: [..., H, Nq, D]; key: [..., H, Nk, D]; value: [..., H, Nk, Dv]; all float32, bfloat16, float16
            or float64. Leading dimensions broadcast; any lengths, widths up to 256, any strides.
        attn_mask: broadcasts to [..., H, Nq, Nk]; boolean (True attends) or floating (added to the scores).
            If it requires a gradient, that comes from the reference, whose memory is quadratic in the length.
            `torch.nn.attention.bias.causal_upper_left` and `causal_lower_right` of (Nq, Nk) also work. Hidden
            entries (False, -inf, or later keys under is_causal) have no effect, even if they are NaN: neither
            on outputs nor on gradients of tokens that do not see them; their own gradients are zero.
        dropout_p: must be 0.
        is_causal: query i sees keys 0 to i, in addition to the mask.
        scale: factor on the scores; default D^-0.5.
        enable_gqa: key and value may have fewer heads than query, each shared by H / Hk consecutive query
            heads.
        window: (left, right): query i sees keys i - left to i + right, aligned at the top left like
            is_causal, which is a right of 0; -1 or None means no limit. Keys outside cost nothing.
        return_lse: also return lse = log sum_j exp(S_ij), [..., H, Nq] in float32 (float64 for float64).

    Returns [..., H, Nq, Dv] in query's dtype; rows that may attend to nothing are zero, with lse -inf. With
    return_lse returns (O, lse), both differentiable: parts over different keys, as in ring attention, combine
    to O = sum_n exp(lse_n - lse) O_n with lse = logaddexp of the lse_n. Sums are in float32 (float64 for
    float64). On CUDA, float32 products use TF32 if PyTorch's precision setting allows it
    (torch.set_float32_matmul_precision), and full precision otherwise; float64 uses the reference there,
    whose memory is quadratic in the length.

    Raises ValueError if shapes, dtypes or dropout_p do not fit, and TypeError for tensors that are not
    floating-point or a scale that is a tensor. torch.autograd.forward_ad inside torch.compile raises
    RuntimeError: use `attention_jvp`. Source: Dao et al., "FlashAttention" (2022).
    """
    if dropout_p != 0.0:
        raise ValueError(f"attention: dropout_p must be 0, because dropout is not supported, got {dropout_p}")
    check_flags("attention", is_causal=is_causal, enable_gqa=enable_gqa, return_lse=return_lse)
    attn_mask, is_causal = causal_bias(attn_mask, is_causal, query, key)
    query, key, value = autocast_matmul(query, key, value)
    left, right = sides("attention", window)
    plan = make_plan(query, key, value, attn_mask, scale, enable_gqa)
    args = (*plan.fold(query, key, value), *Options(plan.mask, is_causal, plan.scale, left, right))
    out, lse = (plain if is_differentiable(attn_mask) else call)("attention", *args)
    out = out if plan.is_plain else out.reshape(plan.out_shape)
    return (out, lse.reshape(plan.out_shape[:-1])) if return_lse else out


@operation(LAYOUTS, "* _ _", "* _ _", "* _", "* _")
def attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = (None, None),
    return_lse: bool = False,
    detach_tangent: bool = False,
) -> Any:
    """`attention` and its tangent in one pass.

        P = softmax(S),  H = P o scale (tQ K^T + Q tK^T),  r = rowsum(H)      tO = H V - r o O + P tV

    Args:
        query, key, value, attn_mask, is_causal, scale, enable_gqa, window: as for `attention`.
        return_lse: also return lse and its tangent lse_t = r.
        query_t, key_t, value_t: tangents with the shapes of query, key and value, or None for zero. For
            four-dimensional inputs they may cover only the first n samples, with the same n for all.
        detach_tangent: treat the tangent as a constant for autograd, so that backward costs the same as
            `attention`'s. Required if n is smaller than the batch and gradients are needed.

    Returns (O, tO), tO for n samples, or (O, tO, lse, lse_t). All are differentiable, in memory linear in the
    length; if detached, tO and lse_t are not.

    Raises like `attention`, and ValueError if tangents do not fit. The running pivot that keeps tO accurate
    was developed for this library.
    """
    check_flags("attention_jvp", is_causal=is_causal, enable_gqa=enable_gqa, return_lse=return_lse)
    attn_mask, is_causal = causal_bias(attn_mask, is_causal, query, key)
    query, key, value, query_t, key_t, value_t = autocast_matmul(query, key, value, query_t, key_t, value_t)
    count = check_tangents(
        "attention_jvp",
        [("query_t", query, query_t), ("key_t", key, key_t), ("value_t", value, value_t)],
        detach_tangent,
    )
    left, right = sides("attention_jvp", window)
    if count is None:
        out, *lse = attention(
            query,
            key,
            value,
            attn_mask,
            0.0,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            window=window,
            return_lse=True,
        )
        lse = [*lse, torch.zeros_like(lse[0])] if return_lse else []
        return out, torch.zeros_like(out), *lse
    plan = make_plan(query, key, value, attn_mask, scale, enable_gqa)
    given = ((query, query_t), (key, key_t), (value, value_t))
    fewer = any(t is not None and t.shape != x.shape for x, t in given)
    if fewer and not plan.is_plain:
        raise ValueError(
            "attention_jvp: tangents of only the first samples need query, key and value "
            "[B, H, N, D] of the same batch size"
        )
    tangents = (query_t, key_t, value_t) if fewer else plan.fold(query_t, key_t, value_t)
    args = (*plan.fold(query, key, value), *tangents, *Options(plan.mask, is_causal, plan.scale, left, right))
    name = "attention_jvp_detached" if detach_tangent else "attention_jvp"
    out, lse, out_t, lse_t = (plain if is_differentiable(attn_mask) else call)(name, *args)
    out = out.reshape(plan.out_shape)
    out_t = out_t if fewer else out_t.reshape(plan.out_shape)
    if not return_lse:
        return out, out_t
    rows = plan.out_shape[:-1]
    return out, out_t, lse.reshape(rows), lse_t if fewer else lse_t.reshape(rows)


class _Kernel(KernelFunction):
    """The raw ops take an additional argument: whether float32 products may use TF32 on CUDA.

    PyTorch's setting is read here, hidden from torch.compile; a raw op that is differentiated directly passes
    its own.
    """

    @classmethod
    def complete(cls, args: Any) -> Any:
        return args if isinstance(args[-1], bool) else (*args, _library.allow_tf32())


class _Attention(_Kernel):
    op = "attention_forward"
    outputs = ("out", "lse")
    residuals = ("lse",)
    samples = ("query", "key", "value", "mask")
    by_reference = ("mask",)

    @classmethod
    def shares_the_rest(cls, args: Any) -> bool:
        return args.cu_seqlens_k is None  # offsets apply to one batch

    @staticmethod
    @functools.partial(in_float32, wide=(1,))
    def reference(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
        window_left: int | None = None,
        window_right: int | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        allow_tf32: bool | None = None,
    ) -> tuple[Tensor, ...]:
        options = Options(mask, is_causal, scale, window_left, window_right, cu_seqlens_q, cu_seqlens_k)
        return reference.attention(query, key, value, **options.plain(query, key))

    @staticmethod
    def fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return _ordered_as(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=_wide(query))

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        query, key, value = args[:3]
        grad = query.new_zeros((*query.shape[:3], value.shape[3])) if grads.out is None else grads.out
        options = *pick(Options, args), grads.lse, *_tf32(args)
        return _AttentionBackward.by_name(grad, query, key, value, residuals.lse, *options)

    @classmethod
    def tangent(cls, args: Any, tangents: Any) -> Any:
        query, key, value = args[:3]
        if all(t is None for t in tangents[:3]):
            lse_t = query.new_zeros(query.shape[:3], dtype=_wide(query))
            return query.new_zeros((*query.shape[:3], value.shape[3])), lse_t
        options = *pick(Options, args), *_tf32(args)
        return call("attention_jvp", query, key, value, *tangents[:3], *options)[2:]


class _AttentionBackward(_Kernel, Gradients):
    of = _Attention
    op = "attention_backward"
    outputs = ("query", "key", "value")

    @staticmethod
    def reference(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lse: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
        window_left: int | None = None,
        window_right: int | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        grad_lse: Tensor | None = None,
        allow_tf32: bool | None = None,
    ) -> tuple[Tensor, ...]:
        options = Options(mask, is_causal, scale, window_left, window_right, cu_seqlens_q, cu_seqlens_k)
        args = query, key, value, *options
        return reference_gradients(_Attention, _AttentionBackward.outputs, (grad, grad_lse), *args)

    @classmethod
    def fake(cls, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return tuple(_ordered_as(x) for x in (query, key, value))


class _AttentionJvp(_Kernel, JvpFunction):
    value = _Attention
    op = "attention_jvp_forward"
    outputs = ("out", "lse", "out_t", "lse_t")
    residuals = ("lse",)
    samples = ("query", "key", "value", "query_t", "key_t", "value_t", "mask")
    by_reference = ("mask",)

    @classmethod
    def shares_the_rest(cls, args: Any) -> bool:
        return args.cu_seqlens_k is None

    @staticmethod
    @functools.partial(in_float32, wide=(1, 3))
    def reference(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_t: Tensor | None,
        key_t: Tensor | None,
        value_t: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
        window_left: int | None = None,
        window_right: int | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        allow_tf32: bool | None = None,
    ) -> tuple[Tensor, ...]:
        options = Options(mask, is_causal, scale, window_left, window_right, cu_seqlens_q, cu_seqlens_k)
        tensors = query, key, value, query_t, key_t, value_t
        out, out_t, lse, lse_t = reference.attention_jvp(*tensors, **options.plain(query, key))
        return out, lse, out_t, lse_t

    @staticmethod
    def fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        count = next((t.shape[0] for t in rest[:3] if t is not None), query.shape[0])
        return *_Attention.fake(query, key, value), *_Attention.fake(query[:count], key, value)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        query, _, value, *_ = tensors = args[:6]
        grad_t = grads.out_t
        if grad_t is None:
            grad_t = query.new_zeros((*query.shape[:3], value.shape[3]))
        options = *pick(Options, args), grads.lse, grads.lse_t, *_tf32(args)
        return _AttentionJvpBackward.by_name(grads.out, grad_t, *tensors, residuals.lse, *options)


class _AttentionJvpBackward(_Kernel, Gradients):
    of = _AttentionJvp
    op = "attention_jvp_backward"
    outputs = ("query", "key", "value", "query_t", "key_t", "value_t")

    @staticmethod
    def reference(
        grad: Tensor | None,
        grad_t: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_t: Tensor | None,
        key_t: Tensor | None,
        value_t: Tensor | None,
        lse: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
        window_left: int | None = None,
        window_right: int | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        grad_lse: Tensor | None = None,
        grad_lse_t: Tensor | None = None,
        allow_tf32: bool | None = None,
    ) -> tuple[Tensor, ...]:
        options = Options(mask, is_causal, scale, window_left, window_right, cu_seqlens_q, cu_seqlens_k)
        args = query, key, value, query_t, key_t, value_t, *options
        grads = grad, grad_lse, grad_t, grad_lse_t
        return reference_gradients(_AttentionJvp, _AttentionJvpBackward.outputs, grads, *args)

    @classmethod
    def fake(cls, grad: Tensor | None, grad_t: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tuple(grad_t.new_empty(0) if x is None else _ordered_as(x) for x in args[:6])


def _tf32(args: Any) -> tuple[bool, ...]:
    """The setting of a raw op that is differentiated directly."""
    return () if args.allow_tf32 is None else (args.allow_tf32,)


def _wide(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _ordered_as(x: Tensor, width: int | None = None) -> Tensor:
    """The rule of csrc/ops/attention_binding.h: token-major if x is."""
    batch, heads, tokens, own = x.shape
    width = own if width is None else width
    if x.stride(2) > x.stride(1):
        return x.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    return x.new_empty((batch, heads, tokens, width))


register("attention", _Attention)
register("attention_backward", _AttentionBackward)
register("attention_jvp", _AttentionJvp)
register("attention_jvp_backward", _AttentionJvpBackward)
register("attention_jvp_detached", detached(_AttentionJvp))
