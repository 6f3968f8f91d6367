"""FLOPs of the compiled ops, for `torch.utils.flop_counter.FlopCounterMode`.

Counted as torch counts its own ops: only matrix products, with a multiplication and an addition as two, and
what the kernels execute rather than what the mathematics needs (a backward that recomputes the scores counts
them). Elementwise ops count nothing. Tile padding and savings from masks (including is_causal) are not
counted; windows and packed sequences count only the query-key pairs inside them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pmf import _library
from pmf.reference.newton_schulz import COEFFICIENTS

__all__ = ["ELEMENTWISE", "FORMULAS", "register_all"]

SYMMETRIC_ROWS = 128
"""Block rows of newton_schulz's symmetric products (kSymmetricRows in csrc/ops/newton_schulz.cpp)."""


class _Options(NamedTuple):
    """The non-tensor arguments of every attention op."""

    mask: Tensor | None
    is_causal: bool
    scale: float
    window_left: int | None = None
    window_right: int | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

    @classmethod
    def of(cls, rest: Sequence[Any]) -> "_Options":
        return cls(*rest[: len(cls._fields)])

    def pairs(self, queries: int, keys: int) -> int:
        """The query-key pairs that interact, per head."""
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            return self._pairs_of_one(queries, keys)
        lengths = zip(_lengths(self.cu_seqlens_q, queries), _lengths(self.cu_seqlens_k, keys), strict=True)
        return sum(self._pairs_of_one(*each) for each in lengths)

    def _pairs_of_one(self, queries: int, keys: int) -> int:
        """Query i of a window sees the keys from i - left to i + right."""
        left, right = self.window_left, self.window_right
        if left is None and right is None:
            return queries * keys
        if self.is_causal:
            right = 0
        behind = 0 if left is None else _ramp(queries, -left, keys)
        return (queries * keys if right is None else _ramp(queries, right + 1, keys)) - behind


def _ramp(count: int, start: int, top: int) -> int:
    """The sum of start, start + 1, ... over `count` terms, each clamped to [0, top]."""

    def below(x: int) -> int:
        rising = max(0, min(x, top + 1))
        return rising * (rising - 1) // 2 + max(0, x - top - 1) * top

    return below(start + count) - below(start)


def _lengths(offsets: Tensor, rows: int) -> list[int]:
    """The sequences' lengths; as equal as possible if the offsets have no values."""
    count = offsets.shape[0] - 1
    if offsets.is_meta or type(offsets) is FakeTensor:
        return [rows * (i + 1) // count - rows * i // count for i in range(count)]
    cuts = offsets.tolist()
    return [end - begin for begin, end in zip(cuts, cuts[1:], strict=False)]


def _products(
    query: Tensor, key: Tensor, value: Tensor, over_width: int, over_value: int, rest: Sequence[Any]
) -> int:
    """This many products of [Nq, D] with [Nk, D], and of [Nq, Nk] with [Nk, Dv], per sample and head."""
    batch, heads, queries, width = query.shape
    pairs = _Options.of(rest).pairs(queries, key.shape[2])
    return 2 * batch * heads * pairs * (over_width * width + over_value * value.shape[3])


def _count(*tensors: Tensor | None) -> int:
    return sum(x is not None for x in tensors)


def _rows(*tensors: Tensor | None) -> int | None:
    """The number of samples with a tangent; None if there is none."""
    return next((x.shape[0] for x in tensors if x is not None), None)


def _attention_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None) -> int:
    return _products(query, key, value, 1, 1, rest)


def _attention_jvp_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
    *rest: Any,
    out_val: Any = None,
) -> int:
    """S and P V for all samples; tQ K^T, Q tK^T, H V and P tV for those with tangents."""
    flops = _products(query, key, value, 1, 1, rest)
    if (n := _rows(query_t, key_t, value_t)) is not None:
        scores = _count(query_t, key_t)
        values = (1 if scores else 0) + _count(value_t)
        flops += _products(query[:n], key, value, scores, values, rest)
    return flops


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, *rest: Any, out_val: Any = None
) -> int:
    """S again, dQ and dK; G V^T and dV."""
    return _products(query, key, value, 3, 2, rest)


def _attention_jvp_backward(
    grad: Tensor | None,
    grad_t: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
    lse: Tensor,
    *rest: Any,
    out_val: Any = None,
) -> int:
    """Nine products over the width, six over the value width; those with an absent operand are skipped.

    In the notation of csrc/include/pmf/attention_backward.h: S, dS K, dS^T Q, and three for each of tQ and
    tK; X V^T, W^T X (W is zero without tQ and tK), and two for each of G and tV.
    """
    scores = _count(query_t, key_t)
    over_value = (2 if scores else 1) + 2 * _count(grad, value_t)
    return _products(query, key, value, 3 * (1 + scores), over_value, rest)


def _patch_sizes(images: Tensor, weight_down: Tensor, weight_up: Tensor) -> tuple[int, int, int, int]:
    """Patches in the batch, pixels of a patch, the bottleneck's width, the tokens' width."""
    batch, channels, height, width = images.shape
    patch = weight_down.shape[-1]
    patches = batch * (height // patch) * (width // patch)
    return patches, channels * patch * patch, *weight_up.shape[::-1]


def _patch_embed(
    images: Tensor, weight_down: Tensor, _: Any, weight_up: Tensor, *__: Any, out_val: Any = None
) -> int:
    patches, pixels, narrow, wide = _patch_sizes(images, weight_down, weight_up)
    return 2 * patches * narrow * (pixels + wide)


def _patch_embed_jvp(
    images: Tensor,
    weight_down: Tensor,
    bias_down: Any,
    weight_up: Tensor,
    bias_up: Any,
    position: Any,
    prefix: Any,
    images_t: Tensor,
    *_: Any,
    out_val: Any = None,
) -> int:
    return sum(_patch_embed(x, weight_down, bias_down, weight_up) for x in (images, images_t))


def _patch_embed_backward(
    grad: Tensor,
    images: Tensor,
    weight_down: Tensor,
    weight_up: Tensor,
    hidden: Tensor,
    images_need_grad: bool,
    *,
    out_val: Any = None,
) -> int:
    """dW_up and dh over all tokens including the prefix; dW_down, and the images' gradient if needed."""
    patches, pixels, narrow, wide = _patch_sizes(images, weight_down, weight_up)
    tokens = grad.shape[0] * grad.shape[1]
    return 2 * narrow * (2 * tokens * wide + (2 if images_need_grad else 1) * patches * pixels)


def _patch_embed_jvp_backward(
    grad: Tensor | None,
    grad_t: Tensor,
    images: Tensor,
    images_t: Tensor,
    weight_down: Tensor,
    weight_up: Tensor,
    hidden: Tensor,
    hidden_t: Tensor,
    images_need_grad: bool,
    *,
    out_val: Any = None,
) -> int:
    pairs = [(grad_t, images_t)] + ([] if grad is None else [(grad, images)])
    return sum(
        _patch_embed_backward(g, x, weight_down, weight_up, hidden, images_need_grad) for g, x in pairs
    )


def _newton_schulz(
    matrices: Sequence[Tensor],
    coefficients: Sequence[float],
    method: str,
    dtype: torch.dtype,
    allow_tf32: bool = False,
    *_: Any,
    out_val: Any = None,
) -> int:
    shapes = (tuple(x.shape) for x in matrices)
    return sum(_orthogonalisation(m, n, coefficients, method, dtype, allow_tf32) for m, n in shapes)


def _muon_step(params: Sequence[Tensor], *settings: Any, out_val: Any = None) -> int:
    return _newton_schulz(params, *settings[-4:])


def orthogonalisation_flops(
    rows: int, columns: int, steps: int = 5, method: str = "auto", dtype: torch.dtype = torch.float16
) -> int:
    """The FLOPs that newton_schulz with the quintic's coefficients executes for one matrix."""
    return _orthogonalisation(rows, columns, COEFFICIENTS["quintic"] * steps, method, dtype)


def _orthogonalisation(
    rows: int,
    columns: int,
    coefficients: Sequence[float],
    method: str,
    dtype: torch.dtype,
    allow_tf32: bool = False,
) -> int:
    """Symmetric products are computed by block rows up to the diagonal."""
    m, n = min(rows, columns), max(rows, columns)
    blocks = [(begin, min(begin + SYMMETRIC_ROWS, m)) for begin in range(0, m, SYMMETRIC_ROWS)]
    half_square = sum((end - begin) * end for begin, end in blocks)
    flops = 0
    lengths = torch.ops.pmf.newton_schulz_segments(rows, columns, coefficients, method, dtype, allow_tf32)
    for length in lengths:
        # X X^T and Q X; each step's square, and what brings gram to the next step; Q, but for the first step.
        flops += half_square * n + m * m * n
        flops += length * half_square * m + (length - 1) * (2 * half_square * m + m * m * m)
    return 2 * flops


def _product(left: Tensor, right: Tensor, *, out_val: Any = None) -> int:
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


def _add_product(add: Tensor, left: Tensor, right: Tensor, *, out_val: Any = None) -> int:
    return _product(left, right)


FORMULAS: dict[str, Callable[..., int]] = {
    "attention_forward": _attention_forward,
    "attention_jvp_forward": _attention_jvp_forward,
    "attention_backward": _attention_backward,
    "attention_jvp_backward": _attention_jvp_backward,
    "patch_embed": _patch_embed,
    "patch_embed_jvp": _patch_embed_jvp,
    "patch_embed_backward": _patch_embed_backward,
    "patch_embed_jvp_backward": _patch_embed_jvp_backward,
    "newton_schulz": _newton_schulz,
    "muon_step": _muon_step,
    "product": _product,
    "add_product": _add_product,
}
"""By raw op torch.ops.pmf.<name>: a function of its arguments."""

ELEMENTWISE = (
    "rms_norm",
    "swiglu",
    "gated_residual",
    "rotary_qk_norm",
    "patch_velocity",
    "adam_step",
    "ema_update",
)
"""Ops whose raw ops compute no matrix product."""


def register_all() -> None:
    """Make every FlopCounterMode count the compiled ops; a no-op without the library."""
    if _library.missing():
        return
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in FORMULAS.items():
        if (op := getattr(torch.ops.pmf, name)) not in flop_registry:
            register_flop_formula(op, get_raw=True)(formula)
