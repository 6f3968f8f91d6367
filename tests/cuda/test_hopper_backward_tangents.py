"""The Hopper attention backward through both outputs: gradients against float64, and who serves what."""

from typing import Any

import pytest
import torch
from helpers import emulator
from helpers.attention import HARD, Problem, Shape, gradients_of_both, hard, problem, shaped
from helpers.hopper import BFLOAT16, DTYPES, FLOAT16, HOPPER_KB, on_backends
from helpers.levels import at_level
from helpers.tolerance import assert_close, error, spread, tolerance

from pmf import _library, ops, reference

pytestmark = pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))

LAUNCHES, OTHERS_LAUNCHES = 4, 3
"""The forward, then the backward's statistics, queries, keys. Others have one launch for the first two."""


def check(
    p: Problem,
    expected: tuple[torch.Tensor, ...],
    plain: tuple[torch.Tensor, ...],
    processors: int,
    **options: Any,
) -> None:
    """`plain`: the gradients of attention alone, which say how many entries count (as in
    tests/ops/test_attention_backward.py)."""
    few = 1 + 3 * (max(map(spread, plain)) - 1)
    with emulator.limits(HOPPER_KB, processors):
        before = emulator.launches()
        found = gradients_of_both(ops, p, **options)
        assert emulator.launches() - before == LAUNCHES
    assert_close(found, expected, few * tolerance("attention gradient", p.query.dtype))


# Tiles are of 96 keys for the statistics, else of 32, row blocks of 64, and rings hold 288. On one
# multiprocessor a head's tiles stay in shared memory for all of its row blocks, if they fit the ring.
CASES = [
    (Shape(batch, heads, heads, queries, keys, 64, 64), dtype, processors)
    for batch, heads, queries, keys, dtype, processors in (
        (1, 2, 276, 276, BFLOAT16, 1), (1, 1, 276, 276, FLOAT16, 132), (2, 3, 1, 1, BFLOAT16, 1),
        (2, 1, 65, 96, FLOAT16, 1), (1, 2, 129, 97, BFLOAT16, 4), (1, 2, 70, 400, FLOAT16, 1),
        (1, 1, 400, 7, BFLOAT16, 132), (1, 3, 33, 31, FLOAT16, 1), (1, 5, 64, 193, BFLOAT16, 2),
    )
]  # fmt: skip
OF_NVCC = [
    (Shape(1, 1, 1, 129, 70, 64, 64), BFLOAT16, 1), (Shape(1, 3, 3, 40, 110, 64, 64), FLOAT16, 1),
]  # fmt: skip


@on_backends(CASES, OF_NVCC)
def test_lengths(backend: str, shape: Shape, dtype: torch.dtype, processors: int) -> None:
    solved = shaped(shape, dtype)
    with at_level(backend):
        check(solved.problem, solved.gradients_of_both, solved.gradients, processors)


@pytest.mark.parametrize("name", HARD)
def test_hard_cases(name: str) -> None:
    dtype = DTYPES[list(HARD).index(name) % 2]
    solved = hard(name, Shape(1, 4, 4, 200, 200, 64, 64), dtype)
    with at_level("emulated"):
        check(solved.problem, solved.gradients_of_both, solved.gradients, 2)


@pytest.mark.parametrize("scale", [0.03, 1.5])
def test_scale(scale: float) -> None:
    p = problem(Shape(1, 1, 1, 70, 130, 64, 64)).to(BFLOAT16)
    expected = gradients_of_both(reference, p.to(torch.float64), scale=scale)
    with at_level("emulated"):
        check(p, expected, expected, 4, scale=scale)


@pytest.mark.parametrize(
    ("factor", "dtype"), [(10, BFLOAT16), (100, FLOAT16), (1000, BFLOAT16), (1e5, BFLOAT16)]
)
def test_rows_that_attend_to_few_keys(factor: float, dtype: torch.dtype) -> None:
    """Keys come in pairs, so every row attends to two, however large the scores are, and gradients nearly
    cancel: what is left is as accurate as by the mma.sync kernels."""
    p = problem(Shape(1, 1, 1, 70, 130, 64, 64))
    pairs = torch.arange(130) // 2
    p = p._replace(query=factor * p.query, key=p.key[:, :, pairs], key_t=p.key_t[:, :, pairs]).to(dtype)
    p = p._replace(query_t=p.query_t / factor)
    expected = gradients_of_both(reference, p.to(torch.float64))
    with at_level("emulated"):
        others = gradients_of_both(ops, p)
        with emulator.limits(HOPPER_KB, 1):
            found = gradients_of_both(ops, p)
    for mine, theirs, exact in zip(found, others, expected, strict=True):
        limit = max(tolerance("attention gradient", dtype), 1.1 * error(theirs, exact))
        assert_close(mine, exact, limit)


def test_gradients_of_log_sums() -> None:
    p = problem(Shape(1, 2, 2, 70, 130, 64, 64)).to(FLOAT16)
    generator = torch.Generator().manual_seed(3)
    grads = (p.grad, p.grad_t, *(torch.randn(1, 2, 70, generator=generator) for _ in range(2)))

    def of(module: Any, inputs: Problem) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs[:6]]
        outputs = module.attention_jvp(*leaves, return_lse=True)
        arriving = [g.to(x.dtype) for g, x in zip(grads, outputs, strict=True)]
        return torch.autograd.grad(outputs, leaves, arriving)

    expected = of(reference, p.to(torch.float64))
    with at_level("emulated"), emulator.limits(HOPPER_KB, 1):
        before = emulator.launches()
        found = of(ops, p)
        assert emulator.launches() - before == LAUNCHES
    assert_close(found, expected, tolerance("attention gradient", FLOAT16) * max(map(spread, expected)))


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_warps_and_copies_gives_the_same_bits(seed: int) -> None:
    p = problem(Shape(1, 3, 3, 140, 100, 64, 64)).to(BFLOAT16)
    with at_level("emulated"), emulator.limits(HOPPER_KB, 1):
        first = gradients_of_both(ops, p)
        emulator.seed(seed)
        again = gradients_of_both(ops, p)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


OTHERS: dict[str, Any] = {
    "grad of a sum": lambda p: (p._replace(grad_t=torch.ones((), dtype=BFLOAT16).expand_as(p.grad)), {}),
    "grouped heads": lambda p: (
        p._replace(key=p.key[:, :1], value=p.value[:, :1], key_t=p.key_t[:, :1], value_t=p.value_t[:, :1]),
        {"enable_gqa": True},
    ),
    "absent tangent": lambda p: (p._replace(key_t=None), {}),
    "causal": lambda p: (p, {"is_causal": True}),
    "fp32": lambda p: (p.to(torch.float32), {}),
    "negative scale": lambda p: (p, {"scale": -0.2}),
    "width 80": lambda p: (problem(Shape(1, 2, 2, 40, 50, 80, 80)).to(BFLOAT16), {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels_serve(name: str) -> None:
    p, options = OTHERS[name](problem(Shape(1, 2, 2, 40, 50, 64, 64)).to(BFLOAT16))
    expected = gradients_of_both(reference, p.to(torch.float64), **options)
    with at_level("emulated"), emulator.limits(HOPPER_KB, 4):
        before = emulator.launches()
        found = gradients_of_both(ops, p, **options)
        assert emulator.launches() - before == OTHERS_LAUNCHES
    assert_close(found, expected, tolerance("attention gradient", p.query.dtype) * max(map(spread, expected)))


def test_plans() -> None:
    """Persistent blocks: one per multiprocessor, or fewer if there is less work."""
    if (plans := _library.introspection()) is None:
        pytest.skip("this build has no introspection module")
    sizes = {"batch": 1, "queries": 276, "keys": 276, "width": 64, "value_width": 64}
    for heads, blocks in ((3072, 132), (40, 120)):
        launches = plans.attention_launches(
            **sizes, heads=heads, key_heads=heads, dtype="bfloat16", backward=True, tangent=True
        )["launches"]
        assert [(each["blocks"], each["threads"], each["tile"]) for each in launches] == [
            (blocks, 384, (128, columns)) for columns in (96, 32, 32)
        ]
