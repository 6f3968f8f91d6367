"""Attention over packed sequences of any lengths, without padding or copies."""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pmf import _library

from ._attention_inputs import Options, check_tensors, scale_of, sides
from ._dispatch import call
from ._inputs import autocast_matmul, check_flags, check_tangents
from ._subclasses import operation
from .attention import Window

__all__ = ["attention_varlen", "attention_varlen_jvp"]


@operation({}, "")
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = (None, None),
    return_lse: bool = False,
) -> Any:
    """`attention` over packed sequences, each attending only to itself.

    Args:
        query: [T, H, D]; key: [S, Hk, D]; value: [S, Hk, Dv]; one dtype, any strides.
        cu_seqlens_q, cu_seqlens_k: offsets, int32 or int64 [B + 1], ascending from 0 to T and S: sequence b
            has rows cu_seqlens[b] to cu_seqlens[b + 1], possibly none. On the CPU or on query's GPU; checking
            offsets on a GPU takes one synchronisation per tensor.
        is_causal, scale, window: as for `attention`; positions count from the first row of a sequence.
        enable_gqa: key and value may have fewer heads than query.
        return_lse: also return lse [H, T].

    Returns [T, H, Dv], bit-identical to `attention` of each sequence; a sequence without keys gives zeros.
    float64 on CUDA uses the reference, whose memory is quadratic in T.

    Raises ValueError if shapes, dtypes or offsets do not fit, and TypeError for tensors that are not
    floating-point or a scale that is a tensor. Source: as for `attention`.
    """
    check_flags("attention_varlen", is_causal=is_causal, enable_gqa=enable_gqa, return_lse=return_lse)
    query, key, value = autocast_matmul(query, key, value)
    options = _options(query, key, value, cu_seqlens_q, cu_seqlens_k, is_causal, scale, enable_gqa, window)
    args = (*map(_four, (query, key, value)), *options)
    out, lse = call("attention", *args)
    return (_packed(out), lse[0]) if return_lse else _packed(out)


@operation({}, "", "")
def attention_varlen_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = (None, None),
    return_lse: bool = False,
    detach_tangent: bool = False,
) -> Any:
    """`attention_varlen` and its tangent in one pass: the equations of `attention_jvp` for each sequence.

    Args:
        query, key, value, cu_seqlens_q, cu_seqlens_k, is_causal, scale, enable_gqa, window: as for
            `attention_varlen`.
        query_t, key_t, value_t: tangents with the shapes of query, key and value, or None for zero.
        return_lse, detach_tangent: as for `attention_jvp`.

    Returns (O, tO), and with return_lse also lse and its tangent, [H, T]. All are differentiable unless
    detached.

    Raises like `attention_varlen`, and ValueError if tangents do not fit.
    """
    check_flags("attention_varlen_jvp", is_causal=is_causal, enable_gqa=enable_gqa, return_lse=return_lse)
    given = autocast_matmul(query, key, value, query_t, key_t, value_t)
    query, key, value, query_t, key_t, value_t = given
    options = _options(query, key, value, cu_seqlens_q, cu_seqlens_k, is_causal, scale, enable_gqa, window)
    pairs = [("query_t", query, query_t), ("key_t", key, key_t), ("value_t", value, value_t)]
    for name, x, x_t in pairs:
        if x_t is not None and x_t.shape != x.shape:
            raise ValueError(
                f"attention_varlen_jvp: {name} must have the shape of its value {list(x.shape)}, "
                f"got {list(x_t.shape)}"
            )
    if check_tangents("attention_varlen_jvp", pairs, detach_tangent) is None:
        query_t = query.new_zeros(()).expand(query.shape)
    args = (*(None if x is None else _four(x) for x in (*given[:3], query_t, key_t, value_t)), *options)
    name = "attention_jvp_detached" if detach_tangent else "attention_jvp"
    out, lse, out_t, lse_t = call(name, *args)
    found = _packed(out), _packed(out_t)
    return (*found, lse[0], lse_t[0]) if return_lse else found


def _four(x: Tensor) -> Tensor:
    """View [T, H, D] as [1, H, T, D]."""
    return x.transpose(0, 1).unsqueeze(0)


def _packed(x: Tensor) -> Tensor:
    return x.squeeze(0).transpose(0, 1)


def _options(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window: Any,
) -> Options:
    """The options, after all checks that need no values."""
    check_tensors("attention_varlen", "[tokens, heads, D]", range(3, 4), 0, query, key, value)
    heads, key_heads = query.shape[1], key.shape[1]
    divides = heads == key_heads or (enable_gqa and key_heads and heads % key_heads == 0)
    if not divides or key_heads != value.shape[1]:
        raise ValueError(
            "attention_varlen: key and value must have as many heads as query, or with enable_gqa a number "
            f"that divides it, got query {list(query.shape)}, key {list(key.shape)} and value "
            f"{list(value.shape)}"
        )
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if x.dtype not in (torch.int32, torch.int64) or x.dim() != 1 or not x.shape[0]:
            raise ValueError(
                f"attention_varlen: {name} must be int32 or int64 [sequences + 1], "
                f"got {x.dtype} {list(x.shape)}"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "attention_varlen: cu_seqlens_q and cu_seqlens_k must have the same number of sequences, "
            f"got {cu_seqlens_q.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}"
        )
    left, right = sides("attention_varlen", window)
    c = scale_of("attention_varlen", scale, query.shape[2])
    return Options(None, is_causal, c, left, right, _on_host(cu_seqlens_q), _on_host(cu_seqlens_k))


_copies: MutableMapping[Tensor, tuple[int, Tensor]] = WeakIdKeyDictionary()


def _on_host(offsets: Tensor) -> Tensor:
    """Offsets copied from a GPU to the CPU: once, not in every layer, as long as they do not change."""
    if not _library.takes_cuda_kernel(offsets) or torch.compiler.is_compiling() or offsets.is_inference():
        return offsets
    version, copy = _copies.get(offsets, (None, offsets))
    if version != offsets._version:
        copy = offsets.to("cpu", copy=True)
        _copies[offsets] = offsets._version, copy
    return copy
