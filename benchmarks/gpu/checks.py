"""Check every op on this device: values, tangents and gradients against float64, in every dtype.

A case is one op at one shape in one dtype; its error is the largest over everything the op computes, each in
units of its limit, so that up to 1 is correct.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pmf import ops, reference
from pmf.bench.harness import Case, Planned, Setting, dtype_name, relative_error, tensors
from pmf.bench.newton_schulz import LIMITS
from pmf.bench.tolerance import spread, tolerance
from pmf.optim import EMA

LENGTHS, WIDTHS = (1, 17, 63, 64, 65, 276), (32, 64, 72, 80, 96, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALF_LIVES = (0.5, 2.0)


@dataclass(frozen=True)
class Problem:
    """Shapes of an op's arguments.

    op: its name in pmf.ops; with the suffix "_jvp" the twin that takes tangents.
    shapes: of the arguments; the first `varying` of them carry tangents and the last `constants` are float32
    numbers in (0, 1) without gradients.
    weave: (arguments, tangents) -> the arguments of the _jvp form.
    """

    op: str
    shapes: Sequence[tuple[int, ...]]
    varying: int
    constants: int = 0
    kind: str = "elementwise"
    note: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    weave: Callable[[list[Tensor], list[Tensor]], Sequence[Tensor | None]] = lambda args, along: [
        *args,
        *along,
    ]


def attention_problem(
    batch: int, heads: int, queries: int, width: int, keys: int = 0, groups: int = 1, **options: Any
) -> Problem:
    q = (batch, heads, queries, width)
    k = (batch, heads // groups, keys or queries, width)
    note = "".join(f", {name}" for name in options) + (f", {keys} keys" if keys else "")
    return Problem("attention", (q, k, k), 3, kind="attention gradient", note=note, options=options)


def problems(scale: str) -> Iterator[Problem]:
    tiny = scale == "tiny"
    batch, tokens = (1, 20) if tiny else (4, 276)
    lengths, widths = ((1, 17), (8,)) if tiny else (LENGTHS, WIDTHS)
    for length in lengths:
        for width in widths:
            yield attention_problem(batch, 2, length, width)
    length, width = lengths[-1], widths[0]
    yield attention_problem(batch, 2, length, width, is_causal=True)
    yield attention_problem(batch, 4, length, width, keys=length // 2 + 1, groups=2, enable_gqa=True)
    yield attention_problem(batch, 2, length, 8 if tiny else 256)
    hidden, mlp, size, patch = (32, 40, 8, 4) if tiny else (768, 2730, 256, 16)
    x, head = (batch, tokens, hidden), (batch, 2, tokens, 8 if tiny else 80)
    yield Problem("rms_norm", (x, (hidden,)), 2)
    yield Problem("swiglu", ((batch, tokens, mlp),) * 2, 2)
    yield Problem("gated_residual", (x, x, (hidden,)), 3)
    table = (tokens - 2, head[-1] // 2)
    yield Problem("rotary_qk_norm", (head, head, head[-1:], head[-1:], table, table), 2, constants=2)
    images, count, rank = (batch, 3, size, size), (size // patch) ** 2, 16 if tiny else 128
    yield Problem(
        "patch_velocity",
        ((batch, count, 3 * patch * patch), images, (batch,)),
        2,
        constants=1,
        weave=lambda args, along: [*args, *along, None],
    )
    yield Problem(
        "patch_embed",
        (images, (rank, 3, patch, patch), (rank,), (hidden, rank), (hidden,), (count, hidden)),
        1,
        kind="gemm",
        weave=lambda args, along: [*args, None, *along],
    )


def cases(setting: Setting) -> Iterator[Planned]:
    for problem in problems(setting.scale):
        for dtype in DTYPES:
            shape = "x".join(map(str, problem.shapes[0]))
            label = f"{problem.op} {shape}{problem.note} {dtype_name(dtype)}"
            facts = {
                "op": f"check {problem.op}",
                "shape": list(problem.shapes[0]),
                "dtype": dtype_name(dtype),
            }
            yield Planned(label, functools.partial(_check_op, setting, problem, dtype), facts)
    for dtype in DTYPES:
        label = f"newton_schulz {dtype_name(dtype)}"
        facts = {"op": "check newton_schulz", "dtype": dtype_name(dtype)}
        yield Planned(label, functools.partial(_check_newton_schulz, setting, dtype), facts)
    yield Planned("ema float32", functools.partial(_check_ema, setting), {"op": "check ema"})


def _only_check(error: Callable[[], float]) -> Case:
    """A case that is only checked; `error` is in units of its limit."""
    return Case({"pmf": lambda: None}, lambda name: error(), limit=1.0, timed=False)


def _check_op(setting: Setting, problem: Problem, dtype: torch.dtype) -> Case:
    fixed = len(problem.shapes) - problem.constants
    inputs = setting.normal(*problem.shapes[:fixed], dtype=dtype)
    constants = [x.sigmoid() for x in setting.normal(*problem.shapes[fixed:], seed=1)]
    along = [x.to(dtype) for x in setting.normal(*problem.shapes[: problem.varying], seed=2)]

    def error() -> float:
        found = results(ops, problem, inputs, constants, along, dtype)
        doubles = [[x.double() for x in group] for group in (inputs, constants, along)]
        exact = results(reference, problem, doubles[0], doubles[1], doubles[2], dtype)
        worst = 0.0
        for what, limit in limits(problem.kind, dtype).items():
            for one, truth in zip(found[what], exact[what], strict=True):
                worst = max(worst, relative_error(one, truth) / (limit * spread(truth)))
        return worst

    return _only_check(error)


def limits(kind: str, dtype: torch.dtype) -> dict[str, float]:
    """Limits for the entries of `results`. Weight gradients sum over all tokens, like a matrix product."""
    gradient = "gemm" if kind == "elementwise" else kind
    value = kind.removesuffix(" gradient")
    return {
        "value": tolerance(value, dtype),
        "value and tangent": tolerance(value, dtype),
        "gradients": tolerance(gradient, dtype),
        "gradients through both": tolerance(gradient, dtype),
    }


def results(
    module: Any,
    problem: Problem,
    inputs: list[Tensor],
    constants: list[Tensor],
    along: list[Tensor],
    dtype: torch.dtype,
) -> dict[str, Sequence[Tensor]]:
    """Everything an op in pmf.ops or pmf.reference computes, for gradients rounded to dtype."""
    x = [t.detach().requires_grad_() for t in inputs]
    x_t = [t.detach().requires_grad_() for t in along]
    plain, jvp = getattr(module, problem.op), getattr(module, f"{problem.op}_jvp")
    value = tensors(plain(*x, *constants, **problem.options))
    both = tensors(jvp(*problem.weave([*x, *constants], x_t), **problem.options))
    generator = torch.Generator(x[0].device).manual_seed(3)
    grads = [torch.randn(y.shape, generator=generator, device=y.device).to(dtype).to(y.dtype) for y in both]
    return {
        "value": [y.detach() for y in value],
        "value and tangent": [y.detach() for y in both],
        "gradients": torch.autograd.grad(value, x, grads[: len(value)]),
        "gradients through both": torch.autograd.grad(both, [*x, *x_t], grads),
    }


def _check_newton_schulz(setting: Setting, dtype: torch.dtype) -> Case:
    """Matrices of mixed shapes in one call, some with sizes that do not tile."""
    small = setting.scale == "tiny"
    shapes = ((12, 20), (20, 12), (9, 9)) if small else ((1024, 2730), (768, 256), (300, 300), (65, 1000))
    matrices = setting.normal(*shapes)

    def error() -> float:
        found = ops.newton_schulz(matrices, compute_dtype=dtype)
        exact = [reference.newton_schulz(g.double()) for g in matrices]
        return relative_error(found, exact) / LIMITS[dtype]

    return _only_check(error)


def _check_ema(setting: Setting) -> Case:
    shapes = ((7,), (3, 5)) if setting.scale == "tiny" else ((1023,), (768, 2048), (1,))

    def error() -> float:
        weights = setting.normal(*shapes)
        named = [(f"w{i}", w) for i, w in enumerate(weights)]
        averages = EMA(named, HALF_LIVES)
        exact = [[w.double() for w in weights] for _ in HALF_LIVES]
        for seed in (1, 2):
            for w, new in zip(weights, setting.normal(*shapes, seed=seed), strict=True):
                w.copy_(new)
            averages.update(64)
            for copy, half_life in zip(exact, HALF_LIVES, strict=True):
                decay = averages.decay(half_life, 64)
                for e, w in zip(copy, weights, strict=True):
                    e.mul_(decay).add_(w.double(), alpha=1 - decay)
        found = [x for copy in averages.copies for x in copy.values()]
        limit = tolerance("elementwise", torch.float32)
        return relative_error(found, [e for copy in exact for e in copy]) / limit

    return _only_check(error)
