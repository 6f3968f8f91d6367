"""Arguments of the attention functions: validation, broadcasting, and the kernels' options."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pmf.arguments import is_number, is_whole
from pmf.reference.attention import Window, same_sequence

from ._subclasses import kind_of

__all__ = [
    "MAX_WIDTH",
    "Options",
    "Plan",
    "causal_bias",
    "check_tensors",
    "make_plan",
    "scale_of",
    "sides",
]

MAX_WIDTH = 256


def sides(op: str, window: Any) -> tuple[int | None, int | None]:
    """A window's left and right; None means no limit."""
    fits = isinstance(window, (tuple, list)) and len(window) == 2
    if not fits or not all(x is None or (_is_count(x) and x >= -1) for x in window):
        raise ValueError(
            f"{op}: window must be (left, right), numbers of keys from 0 on, or -1 or None for no limit, "
            f"got {window}"
        )
    left, right = (None if x is None or x == -1 or x >= _FAR else x for x in window)
    return left, right


_FAR = 1 << 62
"""Beyond every key."""


def _is_count(x: Any) -> bool:
    return is_whole(x) or isinstance(x, torch.SymInt)


def scale_of(op: str, scale: Any, width: int) -> float:
    """The factor on the scores, which is a constant: a tensor's gradient and tangent would be lost."""
    if scale is None:
        return width**-0.5
    if isinstance(scale, Tensor):
        raise TypeError(f"{op}: scale must be a number, got a tensor: multiply query by it instead")
    if not torch.compiler.is_compiling() and not is_number(scale):
        raise ValueError(f"{op}: scale must be a finite number, got {scale!r}")
    return float(scale)


def causal_bias(mask: Any, is_causal: bool, query: Tensor, key: Tensor) -> tuple[Tensor | None, bool]:
    """The mask that a `torch.nn.attention.bias.CausalBias` represents; its memory is meaningless."""
    if mask is None or kind_of(mask) != "bias":
        return mask, is_causal
    sizes, lengths = (mask.seq_len_q, mask.seq_len_kv), (query.shape[-2], key.shape[-2])
    if sizes != lengths:
        raise ValueError(
            f"attention: attn_mask is a CausalBias of {list(sizes)}, but query and key have lengths "
            f"{list(lengths)}"
        )
    ahead = sizes[1] - sizes[0]
    if mask.variant.name == "UPPER_LEFT" or ahead == 0:
        return None, True
    if sizes[0] == 1:  # the last query sees every key
        return None, is_causal
    return torch.ones(sizes, dtype=torch.bool, device=query.device).tril(ahead), is_causal


class Plan(NamedTuple):
    """How inputs of any rank become the kernel's [B, H, N, D], and how the output is reshaped back."""

    shapes: tuple[tuple[int, ...], ...]  # query, key and value after broadcasting
    out_shape: tuple[int, ...]
    mask: Tensor | None
    scale: float
    is_plain: bool

    def fold(self, *tensors: Tensor | None) -> list[Tensor | None]:
        if self.is_plain:
            return list(tensors)
        return [
            None if x is None else _four(x.expand(shape))
            for x, shape in zip(tensors, self.shapes, strict=True)
        ]


def make_plan(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, enable_gqa: bool
) -> Plan:
    q, k, v = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    check_tensors("attention", "[..., N, D]", range(2, 65), -2, query, key, value)
    if enable_gqa:
        heads = q[-3:-2], k[-3:-2], v[-3:-2]
        if (
            not heads[0]
            or heads[1] != heads[2]
            or not heads[1]
            or not heads[1][0]
            or heads[0][0] % heads[1][0]
        ):
            raise ValueError(
                "attention: with enable_gqa key and value must have the same number of heads, a divisor of "
                f"query's, got query {list(q)}, key {list(k)} and value {list(v)}"
            )
        leading = _broadcast(q[:-3], k[:-3], v[:-3])
        q, k, v = (leading + x[-3:] for x in (q, k, v))
    else:
        leading = _broadcast(q[:-2], k[:-2], v[:-2])
        q, k, v = (leading + x[-2:] for x in (q, k, v))
    out_shape = (*q[:-1], v[-1])
    if mask is not None:
        mask = _mask(mask, query.dtype, (*q[:-1], k[-2]))
    is_plain = len(q) == 4 and (tuple(query.shape), tuple(key.shape), tuple(value.shape)) == (q, k, v)
    return Plan((q, k, v), out_shape, mask, scale_of("attention", scale, q[-1]), is_plain)


def check_tensors(
    op: str, layout: str, dims: range, length: int, query: Tensor, key: Tensor, value: Tensor
) -> None:
    """Raise ValueError or TypeError unless tensors have this layout, with tokens along dimension `length`."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() not in dims or not 1 <= x.shape[-1] <= MAX_WIDTH:
            raise ValueError(f"{op}: {name} must be {layout} with 1 <= D <= {MAX_WIDTH}, got {list(x.shape)}")

    def found() -> str:
        return f"got query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)}"

    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"{op}: query and key must have the same width, {found()}")
    if key.shape[length] != value.shape[length]:
        raise ValueError(f"{op}: key and value must have the same length, {found()}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"{op}: query, key and value must have the same dtype, "
            f"got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if not query.dtype.is_floating_point:
        raise TypeError(f"{op}: query, key and value must be floating-point, got {query.dtype}")


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    if shapes[0] == shapes[1] == shapes[2]:  # PyTorch's function takes as long as a small attention call
        return shapes[0]
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError as error:
        q, k, v = (list(shape) for shape in shapes)
        raise ValueError(
            f"attention: the leading dimensions of query {q}, key {k} and value {v} must broadcast "
            "(key and value with fewer heads need enable_gqa=True)"
        ) from error


def _mask(mask: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The mask as a view [B, H, Nq, Nk]; additive ones in float32 or query's dtype."""
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise TypeError(f"attention: attn_mask must be boolean or floating, got {mask.dtype}")
        if mask.dtype != dtype and (mask.dtype != torch.float32 or dtype == torch.float64):
            mask = mask.to(dtype)
    try:
        return _four(mask.expand(shape))
    except RuntimeError as error:
        raise ValueError(
            f"attention: attn_mask {list(mask.shape)} must broadcast to [..., Nq, Nk] = {list(shape)}"
        ) from error


def _four(x: Tensor) -> Tensor:
    """[..., H, N, D] as [B, H, N, D]."""
    if x.dim() >= 4:
        return x.flatten(0, x.dim() - 4)
    return x[(None,) * (4 - x.dim())]


class Options(NamedTuple):
    """The kernels' non-tensor arguments; with offsets the tensors are packed sequences of batch 1."""

    mask: Tensor | None
    is_causal: bool
    scale: float
    window_left: int | None
    window_right: int | None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

    def plain(self, query: Tensor, key: Tensor) -> dict[str, Any]:
        """The reference's options; packed sequences become a mask."""
        window: Window = (self.window_left, self.window_right)
        mask, is_causal = self.mask, self.is_causal
        if self.cu_seqlens_q is not None and self.cu_seqlens_k is not None:
            rows = query.shape[2], key.shape[2]
            cuts_q, cuts_k = self.cu_seqlens_q.to(query.device), self.cu_seqlens_k.to(query.device)
            mask = same_sequence(cuts_q, cuts_k, *rows, is_causal, window)
            is_causal, window = False, (None, None)
        return {
            "attn_mask": mask,
            "is_causal": is_causal,
            "scale": self.scale,
            "window": window,
            "enable_gqa": True,
            "return_lse": True,
        }
