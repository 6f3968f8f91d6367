"""The Hopper attention forward: results against float64, and the calls that use other kernels."""

import itertools
from typing import Any

import pytest
import torch
from helpers import emulator
from helpers.attention import HARD, Problem, Shape, hard, problem, shaped
from helpers.levels import EMULATED, PTX, at_level
from helpers.tolerance import assert_close, spread, tolerance

from pmf import _library, ops, reference

pytestmark = pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))

DTYPES = (torch.bfloat16, torch.float16)
HOPPER_KB = 227
"""KB of shared memory that make the emulator an sm_90 device."""


def launched_hopper() -> bool:
    """Whether the latest launch was of a Hopper kernel: only these use so much shared memory."""
    return emulator.last_shared_bytes() > 200 * 1024


def check(p: Problem, expected: tuple[torch.Tensor, torch.Tensor], processors: int, **options: Any) -> None:
    """Values, tangents, and the same values without tangents, bit for bit."""
    query, key, value, query_t, key_t, value_t = p[:6]
    with emulator.limits(HOPPER_KB, processors):
        both = ops.attention_jvp(query, key, value, query_t, key_t, value_t, **options)
        alone = ops.attention(query, key, value, **options)
    assert_close(both, expected, tolerance("attention", p.query.dtype) * spread(expected[0]))
    assert torch.equal(alone, both[0])


# Keys: a tile (of 96 at width 64, else 48) and its ends, the whole ring, more. Queries: row blocks of 64.
SHAPES = (
    Shape(1, 2, 2, 276, 276, 64, 64),
    Shape(2, 3, 1, 1, 1, 64, 64),
    Shape(2, 1, 1, 65, 96, 64, 64),
    Shape(1, 4, 2, 129, 97, 64, 64),
    Shape(1, 1, 1, 17, 384, 64, 64),
    Shape(1, 2, 2, 70, 385, 64, 64),
    Shape(1, 1, 1, 130, 1000, 64, 64),
    Shape(1, 2, 2, 276, 276, 80, 80),
    Shape(1, 2, 1, 100, 289, 80, 80),
    Shape(1, 3, 3, 70, 191, 96, 96),
    Shape(1, 1, 1, 64, 193, 96, 96),
    Shape(1, 3, 3, 66, 144, 128, 128),
    Shape(2, 1, 1, 64, 170, 128, 128),
)


# nvcc's code runs several times slower: one case per width, alternating between the two types.
OF_NVCC = [
    ("ptx", Shape(1, heads, 1, queries, keys, width, width), dtype, processors)
    for heads, queries, keys, width, dtype, processors in (
        (2, 129, 97, 64, DTYPES[0], 1), (1, 70, 400, 64, DTYPES[1], 4), (2, 66, 170, 80, DTYPES[0], 1),
        (1, 70, 110, 96, DTYPES[1], 4), (2, 64, 110, 128, DTYPES[0], 1),
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "shape", "dtype", "processors"),
    [*itertools.product(EMULATED, SHAPES, DTYPES, (1, 132)), *(OF_NVCC if PTX else ())],
    ids=lambda x: "x".join(map(str, x[:6])) if isinstance(x, Shape) else str(x),
)
def test_lengths(backend: str, shape: Shape, dtype: torch.dtype, processors: int) -> None:
    """On one multiprocessor a head's keys stay in shared memory for all of its row blocks."""
    p, values, *_ = shaped(shape, dtype)
    options = {"enable_gqa": True} if shape.heads != shape.key_heads else {}
    with at_level(backend):
        check(p, values, processors, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HARD)
def test_hard_cases(name: str, dtype: torch.dtype) -> None:
    solved = hard(name, Shape(1, 4, 4, 276, 276, 64, 64), dtype)
    with at_level("emulated"):
        check(solved.problem, solved.values, 2)


def test_projections_of_one_tensor() -> None:
    """[B, N, 3, H, D]: rows far apart, heads adjacent."""
    qkv, qkv_t = torch.randn(2, 2, 100, 3, 2, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    args = [x.transpose(1, 2) for packed in (qkv, qkv_t) for x in packed.unbind(2)]
    expected = reference.attention_jvp(*(x.double() for x in args))
    with at_level("emulated"), emulator.limits(HOPPER_KB, 4):
        found = ops.attention_jvp(*args)
    assert_close(found, expected, tolerance("attention", torch.bfloat16) * spread(expected[0]))


@pytest.mark.parametrize("scale", [0.03, 1.5])
def test_scale(scale: float) -> None:
    p = problem(Shape(1, 1, 1, 70, 130, 64, 64)).to(torch.bfloat16)
    expected = reference.attention_jvp(*(x.double() for x in p[:6] if x is not None), scale=scale)
    with at_level("emulated"):
        check(p, expected, 4, scale=scale)


def test_log_sum_exp_and_its_tangent() -> None:
    p = problem(Shape(1, 2, 2, 70, 200, 64, 64)).to(torch.bfloat16)
    query, key, _, query_t, key_t, _ = (x.double() for x in p[:6] if x is not None)
    scores, scores_t = query @ key.mT / 8, (query_t @ key.mT + query @ key_t.mT) / 8
    with at_level("emulated"), emulator.limits(HOPPER_KB, 1):
        _, lse, _, lse_t = torch.ops.pmf.attention_jvp_forward(*p[:6], None, False, 0.125)
    exact = scores.logsumexp(-1), (scores.softmax(-1) * scores_t).sum(-1)
    torch.testing.assert_close((lse, lse_t), exact, atol=4e-3, rtol=4e-3, check_dtype=False)


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_warps_and_copies_gives_the_same_bits(seed: int) -> None:
    p = problem(Shape(1, 3, 3, 140, 200, 64, 64)).to(torch.bfloat16)
    with at_level("emulated"), emulator.limits(HOPPER_KB, 1):
        first = ops.attention_jvp(*p[:6])
        emulator.seed(seed)
        again = ops.attention_jvp(*p[:6])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def regular(heads: int = 2, queries: int = 40, keys: int = 50, width: int = 64) -> list[torch.Tensor]:
    return list(problem(Shape(1, heads, heads, queries, keys, width, width)).to(torch.bfloat16)[:6])


def off_16_bytes(x: torch.Tensor) -> torch.Tensor:
    padded = torch.zeros(x.numel() + 1, dtype=x.dtype)
    padded[1:] = x.flatten()
    return padded[1:].view(x.shape)


OTHERS = {
    "key off 16 bytes": lambda a: ([a[0], off_16_bytes(a[1]), *a[2:]], {}),
    "rows off 16 bytes": lambda a: (
        [torch.nn.functional.pad(a[0], (0, 3))[..., :64], *a[1:]],
        {},
    ),
    "one key head for all": lambda a: (
        [a[0], a[1][:, :1].expand(-1, 2, -1, -1), *a[2:]],
        {},
    ),
    "negative scale": lambda a: (a, {"scale": -0.2}),
    "no scale": lambda a: (a, {"scale": 0.0}),
    "causal": lambda a: (a, {"is_causal": True}),
    "mask": lambda a: (a, {"attn_mask": torch.arange(50) % 3 > 0}),
    "an absent tangent": lambda a: ([*a[:4], None, a[5]], {}),
    "fp32": lambda a: ([x.float() for x in a], {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_irregular_calls_use_other_kernels(name: str) -> None:
    args, options = OTHERS[name](regular())
    exact = [None if x is None else x.double() for x in args]
    expected = reference.attention_jvp(*exact, **options)
    with at_level("emulated"), emulator.limits(HOPPER_KB, 4):
        found = ops.attention_jvp(*args, **options)
        assert not launched_hopper()
    assert_close(found, expected, tolerance("attention", args[0].dtype) * spread(expected[0]))


def test_regular_calls_use_this_kernel() -> None:
    with at_level("emulated"):
        for shared_kb, hopper in ((HOPPER_KB, True), (163, False)):
            with emulator.limits(shared_kb, 4):
                ops.attention_jvp(*regular())
                assert launched_hopper() == hopper
                ops.attention(*regular()[:3])
                assert launched_hopper() == hopper


def test_plans() -> None:
    """One persistent block per multiprocessor, or fewer if there is less work."""
    if (plans := _library.introspection()) is None:
        pytest.skip("this build has no introspection module")
    sizes = {"batch": 1, "queries": 276, "keys": 276, "width": 64, "value_width": 64}
    for heads, tangent, blocks in ((3072, True, 132), (40, True, 120), (40, False, 80)):
        (launch,) = plans.attention_launches(
            **sizes, heads=heads, key_heads=heads, dtype="bfloat16", tangent=tangent
        )["launches"]
        consumers = 2 if tangent else 3
        planned = launch["blocks"], launch["threads"], launch["tile"]
        assert planned == (blocks, 128 * (1 + consumers), (64 * consumers, 96))
