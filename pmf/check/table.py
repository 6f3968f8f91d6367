"""The cases of a check, by size: "tiny" (a few numbers), "small" (a CPU), "full" (a GPU)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pmf import ops, reference
from pmf.ops import _products
from pmf.optim import EMA, Muon

from .cases import DTYPES, Case, Errors, normal, prepare
from .tolerance import NEWTON_SCHULZ, dtype_name, relative_error, tolerance

__all__ = ["FAMILIES", "SIZES", "Check", "cases", "checks"]

SIZES = ("tiny", "small", "full")
Measure = Callable[[], Errors]


class Check(NamedTuple):
    """prepare(device) creates inputs and exact result; the function it returns runs the op and compares."""

    family: str
    label: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    prepare: Callable[[torch.device], Measure]


def checks(size: str, families: tuple[str, ...] = ()) -> list[Check]:
    """Every op in every dtype at the shapes of a size, family by family; only some families, if named."""
    found = [
        Check(
            case.name,
            f"{case.label} {dtype_name(dtype)}",
            case.shapes[0],
            dtype,
            functools.partial(prepare, case, dtype),
        )
        for case in cases(size)
        for dtype in DTYPES
    ]
    tiny = size == "tiny"
    for dtype in DTYPES:
        for family, make in (("newton_schulz", _newton_schulz), ("muon", _muon)):
            run = functools.partial(make, size, dtype)
            found.append(Check(family, f"{family} {dtype_name(dtype)}", (), dtype, run))
    rows = ((12, 20, 9),) if tiny else ((276, 768, 1000), (5, 33, 7))
    found.append(Check("ema", "ema float32", (), torch.float32, functools.partial(_ema, tiny)))
    found.append(Check("product", "product float32", (), torch.float32, functools.partial(_product, rows)))
    order = list(dict.fromkeys(check.family for check in found))
    chosen = (check for check in found if not families or check.family in families)
    return sorted(chosen, key=lambda check: order.index(check.family))


def cases(size: str) -> Iterator[Case]:
    yield from _attention(size)
    yield from _varlen(size)
    tiny = size == "tiny"
    for batch, tokens, hidden, mlp in _sizes(size):
        x = (batch, tokens, hidden)
        inner = (batch, tokens, mlp)
        yield Case("rms_norm", (0, 1), shapes=(x, (hidden,)), samples=(0,))
        yield Case("swiglu", (0, 1), shapes=(inner, inner), samples=(0, 1))
        yield Case("gated_residual", (0, 1, 2), shapes=(x, x, (hidden,)), samples=(0, 1))
    gate = ((2, 17, 40), (2, 17, 40), (2, 1, 40))
    yield Case("gated_residual", (0, 1, 2), shapes=gate, samples=(0, 1, 2), note=", a gate a sample")
    for batch, tokens, width in {"tiny": [(2, 20, 8)], "small": [(2, 67, 80), (2, 33, 64)]}.get(
        size, [(4, 276, 80), (4, 276, 64), (2, 33, 64)]
    ):
        head, table = (batch, 2, tokens, width), (tokens - 2, width // 2)
        yield Case(
            "rotary_qk_norm",
            (0, 1),
            shapes=(head, (batch, 1, tokens, width), head[-1:], head[-1:], table, table),
            constants=(4, 5),
            samples=(0, 1),
        )
    for batch, channels, height, width, patch, rank, hidden in {
        "tiny": [(2, 3, 8, 8, 4, 16, 32)],
        "small": [(2, 3, 32, 48, 8, 24, 72), (2, 1, 8, 8, 2, 5, 9)],
    }.get(size, [(4, 3, 256, 256, 16, 128, 768), (2, 1, 8, 8, 2, 5, 9)]):
        images, count = (batch, channels, height, width), (height // patch) * (width // patch)
        pixels = (batch, count, channels * patch * patch)
        yield Case(
            "patch_velocity",
            (0, 1, 2),
            shapes=(pixels, images, (batch,)),
            constants=(2,),
            samples=(0, 1, 2),
        )
        down, up = (rank, channels, patch, patch), (hidden, rank)
        yield Case(
            "patch_embed",
            (0, 6),
            "gemm",
            shapes=(images, down, (rank,), up, (hidden,), (count + 3, hidden), (batch, 3, hidden)),
            samples=(0, 6),
        )
        if not tiny:
            bare = (images, down, (rank,), up, (hidden,), (count, hidden))
            yield Case(
                "patch_embed", (0,), "gemm", weave=_without_prefix, shapes=bare, samples=(0,), note=", bare"
            )


def _without_prefix(args: Any, tangents: Any) -> Any:
    return (*args, None, *tangents)


def _sizes(size: str) -> list[tuple[int, int, int, int]]:
    """Batch, tokens, hidden and MLP widths: one that fills all vectors, and one that does not."""
    if size == "tiny":
        return [(2, 20, 32, 40)]
    if size == "small":
        return [(2, 67, 768, 1000), (3, 17, 35, 41)]
    return [(4, 276, 768, 2730), (4, 276, 1280, 3416), (3, 17, 35, 41)]


def _attention(size: str) -> Iterator[Case]:
    if size == "tiny":
        plain = [(length, 8) for length in (1, 17)]
    elif size == "small":
        plain = [(1, 32), (17, 64), (63, 72), (65, 80), (64, 96), (276, 64), (33, 128), (40, 256)]
    else:
        plain = [(n, d) for n in (1, 17, 63, 64, 65, 276) for d in (32, 64, 72, 80, 96, 128)] + [(276, 256)]
    batch = 4 if size == "full" else 2
    for length, width in plain:
        yield _attention_case(batch, length, length, width, width)
    n, d = plain[-1] if size == "tiny" else (65, 64) if size == "small" else (276, 64)
    k = n // 2 + 1
    seen = torch.rand((n, k), generator=torch.Generator().manual_seed(5)) > 0.4
    bias = normal((2, n, k), seed=6)[0].float()
    yield _attention_case(batch, n, n, d, d, ", causal", is_causal=True)
    yield _attention_case(batch, n, k, d, d // 2, f", {k} keys, fewer heads", heads=4, enable_gqa=True)
    yield _attention_case(batch, n, k, d, d, f", {k} keys, boolean mask", attn_mask=seen)
    yield _attention_case(batch, n, k, d, d, f", {k} keys, additive mask", attn_mask=bias)
    yield _attention_case(batch, n, n, d, d, ", window", window=(5, 3))
    yield _attention_case(batch, n, n, d, d, ", lse", samples=(), return_lse=True)


def _attention_case(
    batch: int,
    queries: int,
    keys: int,
    width: int,
    value_width: int,
    note: str = "",
    heads: int = 2,
    samples: tuple[int, ...] = (0, 1, 2),
    **options: Any,
) -> Case:
    q, k, v = (batch, heads, queries, width), (batch, 2, keys, width), (batch, 2, keys, value_width)
    return Case(
        "attention",
        (0, 1, 2),
        "attention gradient",
        options,
        shapes=(q, k, v),
        samples=samples,
        note=note,
    )


def _varlen(size: str) -> Iterator[Case]:
    """Packed sequences: an empty one, one without keys, one of a single token, and longer ones."""
    scale = {"tiny": 1, "small": 5, "full": 20}[size]
    width = 8 if size == "tiny" else 64
    offsets_q, offsets_k = (
        torch.tensor(lengths).mul(torch.tensor([0, scale, scale, scale, scale])).cumsum(0).int()
        for lengths in ((0, 7, 0, 1, 5), (0, 7, 2, 3, 6))
    )
    q, k = (13 * scale, 4, width), (18 * scale, 2, width)
    for causal in (False, True):
        options = {"cu_seqlens_q": offsets_q, "cu_seqlens_k": offsets_k, "is_causal": causal}
        yield Case(
            "attention_varlen",
            (0, 1, 2),
            "attention gradient",
            {**options, "enable_gqa": True},
            shapes=(q, k, k),
            note=", causal" if causal else "",
        )


def _newton_schulz(size: str, dtype: torch.dtype, device: torch.device) -> Measure:
    """Matrices of mixed shapes in one call, some with sizes that do not tile."""
    shapes = {
        "tiny": ((12, 20), (20, 12), (9, 9)),
        "small": ((64, 200), (96, 32), (33, 33), (65, 100)),
        "full": ((1024, 2730), (768, 256), (300, 300), (65, 1000)),
    }[size]
    wide = torch.promote_types(dtype, torch.float32)
    matrices = [x.to(device, wide) for x in normal(*shapes)]
    exact = [reference.newton_schulz(g.double()) for g in matrices]
    return lambda: {
        "forward": relative_error(ops.newton_schulz(matrices, compute_dtype=dtype), exact)
        / NEWTON_SCHULZ[dtype]
    }


ADAM_LIMIT = 2e-5
"""Relative to the change after two float32 steps of 0.02 in numbers around 1; rounding is 3e-6 of that."""


def _muon(size: str, dtype: torch.dtype, device: torch.device) -> Measure:
    """Two steps of Muon for matrices, computing in dtype, and of Adam for everything else."""
    shapes: tuple[tuple[int, ...], ...] = ((20, 70), (40, 30), (7,), (3, 4, 5), (1025,))
    if size == "full":
        shapes += ((768, 2048), (768, 768))
    wide = torch.promote_types(dtype, torch.float32)
    start = [x.to(device, wide) for x in normal(*shapes)]

    def moved(precise: bool) -> list[Tensor]:
        as_dtype = torch.float64 if precise else wide
        params = [nn.Parameter(x.to(as_dtype, copy=True)) for x in start]
        optimizer = Muon(params, lr=0.02, compute_dtype=torch.float64 if precise else dtype)
        for step in (1, 2):
            drawn = normal(*shapes, seed=step)
            for p, g in zip(params, drawn, strict=True):
                p.grad = g.to(device, wide).to(as_dtype)
            optimizer.step()
        return [p.detach().double() - x.double() for p, x in zip(params, start, strict=True)]

    exact = moved(precise=True)
    adam = ADAM_LIMIT if dtype != torch.float64 else NEWTON_SCHULZ[dtype]
    allowed = [NEWTON_SCHULZ[dtype] if len(shape) == 2 else adam for shape in shapes]

    def measure() -> Errors:
        triples = zip(moved(precise=False), exact, allowed, strict=True)
        return {"step": max(relative_error(found, truth) / limit for found, truth, limit in triples)}

    return measure


HALF_LIVES = (0.5, 2.0)


def _ema(tiny: bool, device: torch.device) -> Measure:
    shapes: tuple[tuple[int, ...], ...] = ((7,), (3, 5)) if tiny else ((1023,), (768, 2048), (1,))

    def measure() -> Errors:
        weights, *rounds = ([x.to(device, torch.float32) for x in normal(*shapes, seed=i)] for i in range(3))
        averages = EMA([(f"w{i}", w) for i, w in enumerate(weights)], HALF_LIVES)
        exact = [[w.double() for w in weights] for _ in HALF_LIVES]
        for drawn in rounds:
            for w, new in zip(weights, drawn, strict=True):
                w.copy_(new)
            averages.update(64)
            for copy, half_life in zip(exact, HALF_LIVES, strict=True):
                decay = averages.decay(half_life, 64)
                for e, w in zip(copy, weights, strict=True):
                    e.mul_(decay).add_(w.double(), alpha=1 - decay)
        found = [x for copy in averages.copies for x in copy.values()]
        error = relative_error(found, [e for copy in exact for e in copy])
        return {"update": error / tolerance("elementwise", torch.float32)}

    return measure


def _product(sizes: tuple[tuple[int, int, int], ...], device: torch.device) -> Measure:
    """The layers' own matrix products, plain and added, in both memory orders."""
    made = []
    for m, k, n in sizes:
        a, b, c = (x.to(device, torch.float32) for x in normal((m, k), (n, k), (m, n)))
        made.append((a, b.t(), c, a.double() @ b.t().double()))

    def measure() -> Errors:
        found = [(_products.product(a, b), _products.add_product(c, a, b)) for a, b, c, _ in made]
        exact = [(y, c.double() + y) for _, _, c, y in made]
        error = max(relative_error(f, e) for f, e in zip(found, exact, strict=True))
        return {"forward": error / tolerance("gemm", torch.float32)}

    return measure


FAMILIES = tuple(dict.fromkeys(check.family for check in checks("tiny")))
