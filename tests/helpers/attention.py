"""Easy and hard attention problems, with their results in float64.

A result is the reference's for the inputs as rounded to the dtype under test; it is computed once for all
kernel levels.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pmf import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Shape(NamedTuple):
    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    width: int
    value_width: int


class Problem(NamedTuple):
    """Inputs, tangents, and the gradients that arrive at out and out_t."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_t: Tensor | None
    key_t: Tensor | None
    value_t: Tensor | None
    grad: Tensor
    grad_t: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        return self.map(lambda x: x.to(dtype))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Problem":
        return Problem._make(None if x is None else function(x) for x in self)


# All relevant lengths and widths: full tiles, partial tiles, and one element too many.
SHAPES = (
    Shape(4, 8, 8, 16, 2, 1, 1),
    Shape(2, 3, 3, 1, 15, 7, 7),
    Shape(2, 2, 1, 15, 17, 32, 32),
    Shape(1, 4, 2, 17, 64, 64, 72),
    Shape(1, 2, 2, 64, 15, 72, 64),
    Shape(1, 2, 2, 65, 65, 80, 80),
    Shape(1, 3, 1, 64, 64, 96, 128),
    Shape(1, 1, 1, 65, 276, 128, 96),
    Shape(1, 1, 1, 15, 65, 200, 1),
    Shape(1, 1, 1, 17, 65, 256, 256),
    Shape(1, 1, 1, 276, 276, 64, 64),
    Shape(1, 1, 1, 1, 1000, 64, 64),
    Shape(1, 1, 1, 1000, 64, 32, 32),
)
EMPTY = (
    Shape(1, 2, 2, 0, 5, 8, 8),
    Shape(1, 2, 2, 5, 0, 8, 4),
    Shape(0, 2, 2, 5, 5, 8, 8),
    Shape(2, 0, 0, 5, 5, 8, 8),
)


def problem(shape: Shape, seed: int = 0) -> Problem:
    """Standard normal numbers in float64."""
    g = torch.Generator().manual_seed(seed)
    b, h, hk, nq, nk, d, dv = shape
    inputs = ((b, h, nq, d), (b, hk, nk, d), (b, hk, nk, dv))
    shapes = (*inputs, *inputs, (b, h, nq, dv), (b, h, nq, dv))
    return Problem(*(torch.randn(s, generator=g, dtype=torch.float64) for s in shapes))


def _direction(x: Tensor, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape[-1], generator=g, dtype=torch.float64)


def _aligned(p: Problem, along: Tensor) -> Problem:
    """Scores proportional to `along` [Nk] over the keys."""
    unit = torch.nn.functional.normalize(_direction(p.key, 1), dim=0)
    return p._replace(query=p.query + 8 * unit, key=p.key + along[:, None] * unit)


def _rising(p: Problem) -> Problem:
    return _aligned(p, torch.linspace(-10, 10, p.key.shape[2], dtype=torch.float64))


def _late_sinks(p: Problem) -> Problem:
    along = torch.zeros(p.key.shape[2], dtype=torch.float64)
    along[-3:] = 12
    return _aligned(p, along)


def _tangents(p: Problem) -> dict[str, Tensor]:
    """The tangents of a problem, by name."""
    named = {"query_t": p.query_t, "key_t": p.key_t, "value_t": p.value_t}
    return {name: x for name, x in named.items() if x is not None}


def _common(p: Problem) -> Problem:
    return p._replace(key_t=_tangents(p)["key_t"] + 30 * _direction(p.key, 2), value=p.value + 10)


def _offset(p: Problem) -> Problem:
    return p._replace(key=p.key + 3 * _direction(p.key, 3), value=p.value + 10)


# Problems on which other implementations lose accuracy to cancellation, and why.
HARD: dict[str, Callable[[Problem], Problem]] = {
    "plain": lambda p: p,
    "peaked scores": lambda p: p._replace(query=8 * p.query),
    "common key tangent, large value mean": _common,
    "tangents times 1000": lambda p: p._replace(**{name: 1000 * x for name, x in _tangents(p).items()}),
    "rising maxima": _rising,
    "late sinks": _late_sinks,
    "offset keys and values": _offset,
    "rising maxima, common key tangent, large value mean": lambda p: _common(_rising(p)),
    "late sinks, common key tangent, large value mean": lambda p: _common(_late_sinks(p)),
    "zero query": lambda p: p._replace(query=0 * p.query),
}
# Enough heads that the few gradient entries left by a late sink are a fair sample.
HARD_SHAPES = (Shape(1, 4, 4, 276, 276, 64, 64), Shape(1, 4, 2, 40, 1000, 80, 80))


MASKED_SHAPE = Shape(2, 4, 2, 65, 83, 24, 40)


def _boolean(*shape: int) -> Callable[[torch.dtype], dict[str, Any]]:
    def mask(dtype: torch.dtype) -> dict[str, Any]:
        keep = torch.rand(shape, generator=torch.Generator().manual_seed(5)) > 0.4
        return {"attn_mask": keep}

    return mask


def _additive(*shape: int, hide: bool = False) -> Callable[[torch.dtype], dict[str, Any]]:
    def mask(dtype: torch.dtype) -> dict[str, Any]:
        g = torch.Generator().manual_seed(6)
        bias = 3 * torch.randn(shape, generator=g, dtype=torch.float64)
        if hide:
            bias.masked_fill_(torch.rand(shape, generator=g) < 0.4, -torch.inf)
        return {"attn_mask": bias.to(dtype)}

    return mask


def _rows_that_attend_nothing(dtype: torch.dtype) -> dict[str, Any]:
    keep = _boolean(2, 4, 65, 83)(dtype)["attn_mask"]
    keep[:, :, 3:20] = False
    keep[1, 1] = False
    keep[..., 7] = False
    return {"attn_mask": keep}


def _float32(dtype: torch.dtype) -> dict[str, Any]:
    return _additive(4, 65, 83)(torch.float64 if dtype == torch.float64 else torch.float32)


# Masks by name, for failure messages. Shapes broadcast to [2, 4, 65, 83].
MASKS: dict[str, Callable[[torch.dtype], dict[str, Any]]] = {
    "causal": lambda dtype: {"is_causal": True},
    "boolean [Nq, Nk]": _boolean(65, 83),
    "boolean [B, 1, 1, Nk]": _boolean(2, 1, 1, 83),
    "boolean [H, 1, Nk]": _boolean(4, 1, 83),
    "boolean [B, H, Nq, 1]": _boolean(2, 4, 65, 1),
    "boolean [Nk, Nq] transposed": lambda dtype: {"attn_mask": _boolean(83, 65)(dtype)["attn_mask"].T},
    "boolean, causal": lambda dtype: _boolean(4, 65, 83)(dtype) | {"is_causal": True},
    "rows that attend nothing": _rows_that_attend_nothing,
    "additive [Nq, Nk]": _additive(65, 83),
    "additive [1, H, Nq, 1]": _additive(1, 4, 65, 1),
    "additive [B, 1, Nq, Nk] with -inf": _additive(2, 1, 65, 83, hide=True),
    "additive [Nq, 1] with -inf": _additive(65, 1, hide=True),
    "additive in float32, causal": lambda dtype: _float32(dtype) | {"is_causal": True},
    "additive, every second column": lambda dtype: {
        "attn_mask": _additive(65, 166)(dtype)["attn_mask"][:, ::2]
    },
}


class Solved(NamedTuple):
    problem: Problem
    values: tuple[Tensor, Tensor]  # O and tO
    gradients: tuple[Tensor, ...]  # of attention, for query, key and value
    gradients_of_both: tuple[Tensor, ...]  # of attention_jvp through both outputs, tangents' as well


@functools.cache
def hard(name: str, shape: Shape, dtype: torch.dtype) -> Solved:
    """A case of HARD, rounded to dtype."""
    return solved(HARD[name](problem(shape)).to(dtype), enable_gqa=True)


def smaller_if_emulated(shape: Shape, level: str) -> Shape:
    """The shape, with fewer tokens where kernels are emulated: still several tiles of keys."""
    return shape._replace(queries=20, keys=100) if level in ("emulated", "ptx") else shape


@functools.cache
def shaped(shape: Shape, dtype: torch.dtype) -> Solved:
    """Normal numbers, rounded to dtype."""
    return solved(problem(shape).to(dtype), enable_gqa=True)


@functools.cache
def masked(name: str, dtype: torch.dtype) -> tuple[Solved, dict[str, Any]]:
    """A case of MASKS, and its options."""
    options = {"enable_gqa": True, **MASKS[name](dtype)}
    return solved(problem(MASKED_SHAPE).to(dtype), **options), options


def solved(p: Problem, **options: Any) -> Solved:
    exact = p.to(torch.float64)
    values = reference.attention_jvp(*exact[:6], **options)
    return Solved(
        p, values, gradients(reference, exact, **options), gradients_of_both(reference, exact, **options)
    )


def gradients(module: Any, p: Problem, **options: Any) -> tuple[Tensor, ...]:
    """Gradients of attention for query, key and value."""
    leaves = [x.detach().requires_grad_() for x in p[:3]]
    return torch.autograd.grad(module.attention(*leaves, **options), leaves, p.grad)


def gradients_of_both(module: Any, p: Problem, **options: Any) -> tuple[Tensor, ...]:
    """Gradients of attention_jvp through both outputs, for its inputs and all tangents that are given."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in p[:6]]
    outputs = module.attention_jvp(*leaves, **options)
    return torch.autograd.grad(outputs, [x for x in leaves if x is not None], (p.grad, p.grad_t))


def scattered(x: Tensor, order: tuple[int, ...], steps: tuple[int, ...]) -> Tensor:
    """x as a view with its dimensions in memory order `order`, `steps` apart, and NaN in between.

    A step of 0 repeats x's first entry along that dimension.
    """
    shape = x.shape
    for dim, step in enumerate(steps):
        if step == 0:
            x = x.narrow(dim, 0, min(1, shape[dim]))
    buffer = torch.full([x.shape[d] * max(1, steps[d]) + 1 for d in order], torch.nan, dtype=x.dtype)
    view = buffer.permute([order.index(d) for d in range(x.dim())])
    for dim, step in enumerate(steps):
        view = view.narrow(dim, 0, x.shape[dim] * max(1, step))
        view = view[(slice(None),) * dim + (slice(None, None, max(1, step)),)]
    view.copy_(x)
    return view.expand(shape)
