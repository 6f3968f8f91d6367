"""The Hopper attention forward: results against float64, and the calls that use other kernels."""

import itertools
from typing import Any

import pytest
import torch
from helpers import emulator
from helpers.attention import HARD, Problem, Shape, hard, problem, shaped
from helpers.hopper import DTYPES, HOPPER_KB, launched_hopper
from helpers.levels import EMULATED, PTX, at_level
from helpers.tolerance import assert_close, spread, tolerance

from pmf import _library, ops, reference

pytestmark = pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))


def hopper_launched(p: Problem) -> bool:
    """As launched_hopper(), also at width 96."""
    return emulator.last_shared_bytes() > (190 if p.query.shape[-1] == 96 else 200) * 1024


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
    Shape(1, 5, 5, 40, 276, 80, 80),  # one row block: every second head, a consumer has none
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
    solved = hard(name, Shape(1, 4, 4, 200, 200, 64, 64), dtype)
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


# ---- windows -------------------------------------------------------------------------------------

Window = tuple[int | None, int | None]
WINDOWS: dict[str, Window] = {
    "causal": (None, 0),
    "near": (5, 7),
    "before": (100, 0),
    "ahead": (None, 70),
    "apart": (-40, 170),  # some queries, and all of some row blocks, see nothing
    "nothing": (-100, 50),
}
WINDOWED = (
    Shape(1, 2, 1, 276, 276, 64, 64),
    Shape(2, 1, 1, 70, 300, 80, 80),
    Shape(1, 3, 3, 200, 120, 96, 96),
    Shape(1, 1, 1, 130, 170, 128, 128),
)
SHORT = Shape(1, 1, 1, 70, 130, 64, 64)


def seen(shape: Shape, window: Window) -> torch.Tensor:
    """The keys [Nk] that each query [Nq] sees."""
    left, right = (1 << 30 if x is None else x for x in window)
    ahead = torch.arange(shape.keys) - torch.arange(shape.queries)[:, None]
    return (ahead >= -left) & (ahead <= right)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, where NaN equals NaN."""
    return bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())


def with_lse(p: Problem, window: Window) -> list[torch.Tensor]:
    """O, tO, lse and lse_t by the Hopper kernels, and the same O without tangents, bit for bit."""
    options = None, False, p.query.shape[-1] ** -0.5, *window
    out, lse, out_t, lse_t = torch.ops.pmf.attention_jvp_forward(*p[:6], *options)
    assert hopper_launched(p)
    alone, lse_alone = torch.ops.pmf.attention_forward(*p[:3], *options)
    assert hopper_launched(p)
    assert same(alone, out) and same(lse_alone, lse)
    return [out, out_t, lse, lse_t]


@pytest.mark.parametrize(
    ("backend", "shape", "dtype"),
    [
        *itertools.product(EMULATED, WINDOWED, DTYPES),
        *itertools.product(PTX, (SHORT, SHORT._replace(width=80, value_width=80)), DTYPES[:1]),
    ],
    ids=lambda x: "x".join(map(str, x[:6])) if isinstance(x, Shape) else str(x),
)
@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name: str, backend: str, shape: Shape, dtype: torch.dtype) -> None:
    p, window = problem(shape).to(dtype), WINDOWS[name]
    exact = reference.attention_jvp(
        *p.to(torch.float64)[:6], attn_mask=seen(shape, window), enable_gqa=True, return_lse=True
    )
    with at_level(backend), emulator.limits(HOPPER_KB, 4):
        found = with_lse(p, window)
    assert torch.equal(found[2].isinf(), exact[2].isinf())  # queries that see nothing
    found, expected = ([x.masked_fill(x.isinf(), 0) for x in each] for each in (found, exact))
    assert_close(found, expected, 2 * tolerance("attention", dtype) * spread(exact[0]))


@pytest.mark.parametrize("name", [name for name in WINDOWS if name != "nothing"])
def test_tiles_outside_the_window_are_skipped(name: str) -> None:
    """Each row block visits the tiles that it sees; each warp sums P and H of a tile by 6 products each."""
    shape, window = Shape(1, 1, 1, 600, 500, 64, 64), WINDOWS[name]
    rows, keys = 64, 96
    visited = sum(
        bool(seen(shape, window)[q : q + rows, k : k + keys].any())
        for q, k in itertools.product(range(0, shape.queries, rows), range(0, shape.keys, keys))
    )
    with at_level("emulated"), emulator.limits(HOPPER_KB, 3):
        before = emulator.products()
        torch.ops.pmf.attention_jvp_forward(
            *problem(shape).to(torch.bfloat16)[:6], None, False, 0.125, *window
        )
        assert emulator.products() - before == visited * 4 * 2 * 6


@pytest.mark.parametrize("width", [64, 80, 96, 128])
def test_a_window_that_hides_nothing_changes_no_bit(width: int) -> None:
    p = problem(Shape(1, 2, 2, 140, 200, width, width)).to(torch.bfloat16)
    with at_level("emulated"), emulator.limits(HOPPER_KB, 2):
        wide, whole = with_lse(p, (200, 200)), with_lse(p, (None, None))
    assert all(torch.equal(a, b) for a, b in zip(wide, whole, strict=True))


@pytest.mark.parametrize(
    ("width", "bad"), [(64, torch.nan), (80, torch.inf), (96, -torch.inf), (128, torch.nan)]
)
@pytest.mark.parametrize("which", ["key", "value", "key_t", "value_t"])
def test_hidden_keys_and_values_have_no_effect(which: str, width: int, bad: float) -> None:
    """Other queries of the same row block see them: only their results change."""
    shape, window = Shape(1, 2, 1, 150, 170, width, width), (30, 10)
    p = problem(shape).to(torch.bfloat16)
    dirty = p._replace(**{which: getattr(p, which).clone()})
    columns = [0, width - 3]
    places = torch.tensor([20, 95, 169])
    for column in columns:
        getattr(dirty, which)[:, :, places, column] = bad
    with at_level("emulated"), emulator.limits(HOPPER_KB, 2):
        clean, actual = (with_lse(x, window) for x in (p, dirty))
    hit = seen(shape, window)[:, places].any(-1)
    for a, c in zip(actual, clean, strict=True):
        assert torch.equal(a[:, :, ~hit], c[:, :, ~hit])
    out, out_t = actual[:2]
    assert not out_t[:, :, hit].isfinite().all(-1).any()
    if which == "value":
        finite = torch.ones_like(out, dtype=torch.bool)
        finite[:, :, hit.nonzero(), torch.tensor(columns)] = False
        assert torch.equal(out.isfinite(), finite)
        assert torch.equal(out[finite], clean[0][finite])


# ---- packed sequences ----------------------------------------------------------------------------

QUERIES, KEYS = (70, 0, 1, 130, 5, 33), (70, 4, 0, 150, 5, 90)
"""The lengths of sequences."""
PACKED = [
    *(
        (level, width, dtype)
        for level in EMULATED
        for width, dtype in zip((64, 80, 96, 128), DTYPES * 2, strict=True)
    ),
    *((level, 64, torch.bfloat16) for level in PTX),
]
LIMITS: tuple[dict[str, Any], ...] = ({}, {"is_causal": True}, {"window": (20, 9)})


def offsets(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def drawn(width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """query, key, value and their tangents, [rows, heads, width], with two heads per key head."""
    g = torch.Generator().manual_seed(0)
    shapes = [(sum(QUERIES), 4, width), (sum(KEYS), 2, width), (sum(KEYS), 2, width)] * 2
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def packed(module: Any, x: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """O, tO, lse and lse_t with rows first."""
    cuts = offsets(QUERIES), offsets(KEYS)
    out, out_t, lse, lse_t = module.attention_varlen_jvp(
        *x, *cuts, enable_gqa=True, return_lse=True, **options
    )
    return [out, out_t, lse.mT, lse_t.mT]


def one_by_one(module: Any, x: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    rows = [[slice(*cut) for cut in itertools.pairwise(offsets(n).tolist())] for n in (QUERIES, KEYS)]
    parts = []
    for q, k in zip(*rows, strict=True):
        one = [t[r].transpose(0, 1)[None] for t, r in zip(x, (q, k, k) * 2, strict=True)]
        out = module.attention_jvp(*one, enable_gqa=True, return_lse=True, **options)
        parts.append([y[0].transpose(0, 1) for y in out])
    return [torch.cat(ys) for ys in zip(*parts, strict=True)]


@pytest.mark.parametrize(("backend", "width", "dtype"), PACKED, ids=str)
@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_packed_sequences(options: dict[str, Any], backend: str, width: int, dtype: torch.dtype) -> None:
    """One launch, as a loop bit for bit, and against float64."""
    x = drawn(width, dtype)
    exact = one_by_one(reference, [t.double() for t in x], **options)
    with at_level(backend), emulator.limits(HOPPER_KB, 4):
        before = emulator.launches()
        found = packed(ops, x, **options)
        assert emulator.launches() == before + 1
        assert emulator.last_shared_bytes() > 190 * 1024
        loop = one_by_one(ops, x, **options)
        alone = ops.attention_varlen(*x[:3], offsets(QUERIES), offsets(KEYS), enable_gqa=True, **options)
    assert torch.equal(alone, found[0])
    assert all(torch.equal(a, b) for a, b in zip(found, loop, strict=True))
    found, exact = ([y.masked_fill(y.isinf(), 0) for y in each] for each in (found, exact))
    assert_close(found, exact, 2 * tolerance("attention", dtype))


@pytest.mark.parametrize("which", range(1, 6))
@pytest.mark.parametrize("sequence", [3, 5])
def test_nan_in_one_sequence_stays_there(sequence: int, which: int) -> None:
    """Its first rows lie in the last tile of the sequence before."""
    x = drawn(64, torch.bfloat16)
    dirty = [t.clone() for t in x]
    cuts = offsets(QUERIES if which == 3 else KEYS)
    dirty[which][cuts[sequence] : cuts[sequence + 1]] = torch.nan
    with at_level("emulated"), emulator.limits(HOPPER_KB, 2):
        clean, actual = packed(ops, x), packed(ops, dirty)
    own = torch.zeros(sum(QUERIES), dtype=torch.bool)
    own[offsets(QUERIES)[sequence] : offsets(QUERIES)[sequence + 1]] = True
    assert actual[1][own].isnan().all()
    for a, c in zip(actual, clean, strict=True):
        assert torch.equal(a[~own], c[~own])


def test_packed_sequences_without_rows() -> None:
    x = torch.zeros(0, 2, 64, dtype=torch.bfloat16)
    cuts = torch.zeros(4, dtype=torch.int64)
    with at_level("emulated"), emulator.limits(HOPPER_KB, 2):
        assert ops.attention_varlen(x, x, x, cuts, cuts).shape == (0, 2, 64)


# ---- other calls ---------------------------------------------------------------------------------


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
