"""The Hopper attention backward: gradients against float64, and the calls that other kernels serve."""

from typing import Any

import pytest
import torch
from helpers import emulator
from helpers.attention import HARD, Problem, Shape, gradients, hard, problem, shaped
from helpers.hopper import BFLOAT16, DTYPES, FLOAT16, HOPPER_KB, launched_hopper, on_backends
from helpers.levels import at_level
from helpers.tolerance import assert_close, spread, tolerance

from pmf import _library, ops, reference

pytestmark = pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))


def whole_heads(p: Problem, processors: int) -> bool:
    """Whether one launch keeps whole heads in shared memory."""
    batch, heads, tokens, width = p.query.shape
    short = p.query.shape == p.key.shape and width == 64 and 64 < tokens <= 288
    return short and batch * heads >= 2 * processors


def check(p: Problem, expected: tuple[torch.Tensor, ...], processors: int, **options: Any) -> None:
    few = 1 + 3 * (max(map(spread, expected)) - 1)
    with emulator.limits(HOPPER_KB, processors):
        before = emulator.launches()
        found = gradients(ops, p, **options)
        assert launched_hopper()
        # The forward, and one or two of the backward.
        assert emulator.launches() - before == (2 if whole_heads(p, processors) else 3)
    assert_close(found, expected, few * tolerance("attention gradient", p.query.dtype))


# Tiles are of 96 rows at width 64, else of 48, row blocks of 64; a ring of 7, 12, 9 and 6 tiles. On one
# multiprocessor a head's tiles stay in shared memory for all of its row blocks, if they fit the ring.
CASES = [
    (Shape(batch, heads, heads, queries, keys, width, width), dtype, processors)
    for batch, heads, queries, keys, width, dtype, processors in (
        (1, 2, 276, 276, 64, BFLOAT16, 1), (1, 1, 276, 276, 64, FLOAT16, 132), (2, 3, 1, 1, 64, BFLOAT16, 1),
        (2, 1, 65, 96, 64, FLOAT16, 1), (1, 2, 129, 97, 64, BFLOAT16, 4), (1, 2, 70, 700, 64, FLOAT16, 1),
        (1, 1, 700, 7, 64, BFLOAT16, 132), (1, 2, 276, 276, 80, BFLOAT16, 1), (2, 1, 99, 289, 80, FLOAT16, 4),
        (1, 3, 70, 191, 96, BFLOAT16, 1), (1, 1, 193, 64, 96, FLOAT16, 4), (2, 1, 66, 144, 128, BFLOAT16, 1),
        (1, 2, 300, 64, 128, FLOAT16, 1),
        # Whole heads: of one, two and three tiles; two to five row blocks; three heads and more per block.
        (1, 2, 65, 65, 64, FLOAT16, 1), (1, 3, 96, 96, 64, BFLOAT16, 1), (2, 3, 97, 97, 64, BFLOAT16, 2),
        (1, 7, 129, 129, 64, FLOAT16, 1), (2, 1, 192, 192, 64, BFLOAT16, 1), (1, 5, 200, 200, 64, FLOAT16, 2),
        (1, 4, 256, 256, 64, BFLOAT16, 1), (1, 3, 276, 276, 64, FLOAT16, 1),
        (1, 9, 288, 288, 64, BFLOAT16, 3),
    )
]  # fmt: skip
OF_NVCC = [
    (Shape(1, 1, 1, 129, 97, 64, 64), BFLOAT16, 1), (Shape(1, 1, 1, 60, 110, 80, 80), FLOAT16, 4),
    (Shape(1, 3, 3, 130, 130, 64, 64), BFLOAT16, 1),
]  # fmt: skip


@on_backends(CASES, OF_NVCC)
def test_lengths(backend: str, shape: Shape, dtype: torch.dtype, processors: int) -> None:
    solved = shaped(shape, dtype)
    with at_level(backend):
        check(solved.problem, solved.gradients, processors)


@pytest.mark.parametrize("processors", [2, 3], ids=["whole heads", "two launches"])
@pytest.mark.parametrize("name", HARD)
def test_hard_cases(name: str, processors: int) -> None:
    dtype = DTYPES[list(HARD).index(name) % 2]
    solved = hard(name, Shape(1, 4, 4, 200, 200, 64, 64), dtype)
    with at_level("emulated"):
        check(solved.problem, solved.gradients, processors)


@pytest.mark.parametrize("scale", [0.03, 1.5])
def test_scale(scale: float) -> None:
    p = problem(Shape(1, 1, 1, 70, 130, 64, 64)).to(BFLOAT16)
    expected = gradients(reference, p.to(torch.float64), scale=scale)
    with at_level("emulated"):
        check(p, expected, 4, scale=scale)


def backward(
    p: Problem, lse_error: float = 0, lse_grad: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """The op itself, with an lse that is off by this fraction."""
    with at_level("emulated"), emulator.limits(HOPPER_KB, 1):
        _, lse = torch.ops.pmf.attention_forward(*p[:3], None, False, 0.125)
        lse *= 1 + lse_error
        found = torch.ops.pmf.attention_backward(
            p.grad, *p[:3], lse, None, False, 0.125, None, None, None, None, lse_grad
        )
        assert launched_hopper()
    return found


LENGTHS = pytest.mark.parametrize(
    "shape",
    [Shape(1, 1, 1, 70, 130, 64, 64), Shape(1, 2, 2, 130, 130, 64, 64)],
    ids=["two launches", "whole heads"],
)


@LENGTHS
@pytest.mark.parametrize(
    ("factor", "dtype"), [(10, BFLOAT16), (100, BFLOAT16), (10, FLOAT16), (100, FLOAT16)]
)
def test_rows_that_attend_to_few_keys(factor: float, dtype: torch.dtype, shape: Shape) -> None:
    """Their gradients nearly cancel, unless H is taken about a mean that these keys dominate."""
    p = problem(shape)
    p = p._replace(query=factor * p.query, key=p.key[:, :, torch.arange(130) // 2]).to(dtype)
    expected = gradients(reference, p.to(torch.float64))
    assert_close(backward(p), expected, tolerance("attention gradient", dtype) * max(map(spread, expected)))


@LENGTHS
@pytest.mark.parametrize("factor", [300, 1000])
def test_scores_of_thousands(factor: float, shape: Shape) -> None:
    """Queries and keys agree on every weight, however large the scores are."""
    p = problem(shape)
    p = p._replace(query=factor * p.query, key=p.key[:, :, torch.arange(130) // 2]).to(BFLOAT16)
    expected = gradients(reference, p.to(torch.float64))
    limit = tolerance("attention gradient", BFLOAT16) * max(map(spread, expected))
    assert_close(backward(p), expected, limit)


@LENGTHS
@pytest.mark.parametrize("size", [2e3, 2e5])
def test_scores_that_a_rounded_lse_cannot_order(size: float, shape: Shape) -> None:
    """At 10^10, fp32 numbers are 1024 apart. Keys come in pairs, so every row attends to two."""
    p = problem(shape)
    p = p._replace(query=size * p.query, key=size * p.key[:, :, torch.arange(130) // 2]).to(BFLOAT16)
    expected = gradients(reference, p.to(torch.float64))[1:]  # that of the queries is 0
    limit = tolerance("attention gradient", BFLOAT16) * max(map(spread, expected))
    for lse_error in (0, 3e-7, -3e-7):
        assert_close(backward(p, lse_error)[1:], expected, limit)


@LENGTHS
def test_gradients_of_log_sums(shape: Shape) -> None:
    p = problem(shape).to(FLOAT16)
    lse_grad = torch.randn(shape[0], shape.heads, shape.queries, generator=torch.Generator().manual_seed(3))
    leaves = [x.double().requires_grad_() for x in p[:3]]
    scores = leaves[0] @ leaves[1].mT / 8
    outputs = scores.softmax(-1) @ leaves[2], scores.logsumexp(-1)
    expected = torch.autograd.grad(outputs, leaves, (p.grad.double(), lse_grad.double()))
    found = backward(p, lse_grad=lse_grad)
    assert_close(found, expected, tolerance("attention gradient", FLOAT16) * max(map(spread, expected)))


@pytest.mark.parametrize("keys", [200, 140], ids=["two launches", "whole heads"])
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_warps_and_copies_gives_the_same_bits(seed: int, keys: int) -> None:
    p = problem(Shape(1, 3, 3, 140, keys, 64, 64)).to(BFLOAT16)
    with at_level("emulated"), emulator.limits(HOPPER_KB, 1):
        first = gradients(ops, p)
        emulator.seed(seed)
        again = gradients(ops, p)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


OTHERS: dict[str, Any] = {
    "grad of a sum": lambda p: (p._replace(grad=torch.ones((), dtype=BFLOAT16).expand_as(p.grad)), {}),
    "grouped heads": lambda p: (p._replace(key=p.key[:, :1], value=p.value[:, :1]), {"enable_gqa": True}),
    "causal": lambda p: (p, {"is_causal": True}),
    "fp32": lambda p: (p.to(torch.float32), {}),
    "negative scale": lambda p: (p, {"scale": -0.2}),
    "no scale": lambda p: (p, {"scale": 0.0}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels_serve(name: str) -> None:
    p, options = OTHERS[name](problem(Shape(1, 2, 2, 40, 50, 64, 64)).to(BFLOAT16))
    expected = gradients(reference, p.to(torch.float64), **options)
    with at_level("emulated"), emulator.limits(HOPPER_KB, 4):
        found = gradients(ops, p, **options)
        assert not launched_hopper()
    assert_close(found, expected, tolerance("attention gradient", p.query.dtype) * max(map(spread, expected)))


def test_plans() -> None:
    """One persistent block per multiprocessor, or fewer if there is less work. One launch for many heads."""
    if (plans := _library.introspection()) is None:
        pytest.skip("this build has no introspection module")
    sizes = {"batch": 1, "queries": 276, "keys": 276, "width": 64, "value_width": 64}
    for heads, blocks in ((3072, [132]), (40, [120, 120])):
        launches = plans.attention_launches(
            **sizes, heads=heads, key_heads=heads, dtype="bfloat16", backward=True
        )["launches"]
        assert [(each["blocks"], each["threads"], each["tile"]) for each in launches] == [
            (count, 384, (128, 96)) for count in blocks
        ]
