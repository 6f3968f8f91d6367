"""Packed sequences against a loop over them, bit for bit, and against float64."""

import sys
from collections.abc import Iterator

import pytest
import torch
from helpers.kernels import PLACES, at_place
from helpers.levels import CPU_LEVELS, EMULATED, EVERYWHERE, at_level
from helpers.tolerance import assert_close, tolerance
from torch import Tensor

from pmf import ops, reference
from pmf.ops.attention_varlen import _on_host

LENGTHS_Q, LENGTHS_K = (70, 0, 1, 130, 5, 33), (70, 4, 0, 150, 5, 90)
HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH = 6, 3, 24, 40
OPTIONS = (
    {},
    {"is_causal": True},
    {"window": (20, 9)},
    {"window": (12, -1), "is_causal": True, "scale": -0.2},
)


@pytest.fixture(params=CPU_LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with at_level(request.param):
        yield request.param


def offsets(lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def drawn(dtype: torch.dtype, heads: int, key_heads: int, width: int, value_width: int) -> list[Tensor]:
    """query, key, value, their tangents, and gradients of both outputs."""
    g = torch.Generator().manual_seed(0)
    T, S = sum(LENGTHS_Q), sum(LENGTHS_K)
    primals = (T, heads, width), (S, key_heads, width), (S, key_heads, value_width)
    shapes = (*primals, *primals, (T, heads, value_width), (T, heads, value_width))
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """With grouped heads, some not contiguous."""
    found = drawn(dtype, HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH)
    found[1] = found[1].transpose(0, 1).contiguous().transpose(0, 1)
    found[2] = torch.cat((found[2], found[2]), -1)[..., :VALUE_WIDTH]
    return found


def loop(module, *tensors: Tensor, **options) -> list[Tensor]:
    """attention_jvp for each sequence separately."""
    parts = []
    cuts_q, cuts_k = offsets(LENGTHS_Q).tolist(), offsets(LENGTHS_K).tolist()
    for q0, q1, k0, k1 in zip(cuts_q, cuts_q[1:], cuts_k, cuts_k[1:], strict=False):
        rows = (slice(q0, q1), slice(k0, k1), slice(k0, k1)) * 2
        one = [x[r].transpose(0, 1)[None] for x, r in zip(tensors, rows, strict=True)]
        out, out_t, lse, lse_t = module.attention_jvp(*one, enable_gqa=True, return_lse=True, **options)
        parts.append((out[0].transpose(0, 1), out_t[0].transpose(0, 1), lse[0], lse_t[0]))
    return [torch.cat(x, d) for x, d in zip(zip(*parts, strict=True), (0, 0, 1, 1), strict=True)]


def packed(module, *tensors: Tensor, **options) -> list[Tensor]:
    cuts = offsets(LENGTHS_Q).int(), offsets(LENGTHS_K).int()
    return list(module.attention_varlen_jvp(*tensors, *cuts, enable_gqa=True, return_lse=True, **options))


def everything(find, module, x: list[Tensor], **options) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in x[:6]]
    outputs = find(module, *leaves, **options)
    shown = [y.masked_fill(y.isinf(), 0) for y in outputs]
    rows = [torch.ones_like(y) for y in shown[2:]]
    return [*(y.detach() for y in shown), *torch.autograd.grad(shown, leaves, [*x[6:8], *rows])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_as_a_loop_bit_for_bit(level, threads, options, dtype):
    """With four threads some heads are split between two of them, as in the loop."""
    torch.set_num_threads(threads)
    x = inputs(dtype)
    expected, actual = everything(loop, ops, x, **options), everything(packed, ops, x, **options)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_float64(level, options, dtype):
    x = inputs(dtype)
    options = {
        **options,
        "window": tuple(None if s == -1 else s for s in options.get("window", (None, None))),
    }
    exact = everything(loop, reference, [t.double() for t in x], **options)
    actual = everything(packed, ops, x, **options)
    assert_close(actual[:4], exact[:4], 2 * tolerance("attention", dtype))
    assert_close(actual[4:], exact[4:], 2 * tolerance("attention gradient", dtype))


FEW_Q, FEW_K = (33, 0, 1, 70, 5), (33, 4, 0, 90, 5)
ROWS_AND_MORE = (
    (torch.bfloat16, 4, 2, 24, 40, {"window": (12, None), "is_causal": True, "scale": -0.2}),
    (torch.float32, 2, 1, 24, 40, {"window": (12, 9)}),
    (torch.bfloat16, 2, 2, 64, 64, {}),  # kernels without masks and strides, but with packed sequences
    (torch.float16, 1, 1, 80, 80, {}),
)


@pytest.mark.parametrize("level", [x for x in EVERYWHERE if x not in CPU_LEVELS])
@pytest.mark.parametrize(("dtype", "heads", "key_heads", "width", "value_width", "options"), ROWS_AND_MORE)
def test_on_a_gpu(level, dtype, heads, key_heads, width, value_width, options, monkeypatch):
    """As a loop bit for bit, and against float64."""
    monkeypatch.setattr(sys.modules[__name__], "LENGTHS_Q", FEW_Q)
    monkeypatch.setattr(sys.modules[__name__], "LENGTHS_K", FEW_K)
    x = drawn(dtype, heads, key_heads, width, value_width)
    exact = everything(loop, reference, [t.double() for t in x], **options)
    with at_level(level):
        actual = everything(packed, ops, x, **options)
        expected = everything(loop, ops, x, **options)
    assert_close(actual[:4], exact[:4], 2 * tolerance("attention", dtype))
    assert_close(actual[4:], exact[4:], 2 * tolerance("attention gradient", dtype))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_reference_is_the_loop(options):
    """The reference treats packed sequences as a mask."""
    options = {
        **options,
        "window": tuple(None if s == -1 else s for s in options.get("window", (None, None))),
    }
    x = inputs(torch.float64)
    assert_close(
        everything(packed, reference, x, **options), everything(loop, reference, x, **options), 1e-12
    )


def test_nan_in_one_sequence_stays_there(level):
    stays(inputs(torch.float32))


@pytest.mark.parametrize("level", EMULATED)
@pytest.mark.parametrize("width", [8, 64])
def test_nan_in_one_sequence_stays_there_on_a_gpu(level, width, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LENGTHS_Q", FEW_Q)
    monkeypatch.setattr(sys.modules[__name__], "LENGTHS_K", FEW_K)
    with at_level(level):
        stays(drawn(torch.bfloat16, 1, 1, width, width))


def stays(x: list[Tensor]) -> None:
    clean = everything(packed, ops, x)
    x[2] = x[2].clone()
    x[2][10] = torch.nan
    dirty = everything(packed, ops, x)
    first_q, first_k = LENGTHS_Q[0], LENGTHS_K[0]
    assert dirty[0][:first_q].isnan().any()
    for i, (d, c) in enumerate(zip(dirty, clean, strict=True)):
        first = first_q if i in (0, 1, 2, 3, 4, 7) else first_k
        d, c = (y.transpose(0, 1) if i in (2, 3) else y for y in (d, c))
        assert torch.equal(d[first:], c[first:])


@pytest.mark.parametrize("level", [*CPU_LEVELS, *EMULATED])
def test_empty_tensors(level):
    with at_level(level):
        check_nothing()


def check_nothing():
    empty = torch.zeros(0, 2, 8)
    for count in (1, 4):
        cuts = torch.zeros(count, dtype=torch.int64)
        assert ops.attention_varlen(empty, empty, empty, cuts, cuts).shape == (0, 2, 8)
        assert ops.attention_varlen_jvp(empty, empty, empty, empty, None, None, cuts, cuts)[1].shape == (
            0,
            2,
            8,
        )


X = torch.zeros(5, 2, 8)


@pytest.mark.parametrize("level", [*CPU_LEVELS[-1:], *EMULATED])
@pytest.mark.parametrize(
    ("cuts_q", "cuts_k", "message"),
    [
        ([0, 3, 2, 5], [0, 1, 2, 5], "must ascend"),
        ([0, 4], [0, 5], "end with the number of rows, 5"),
        ([1, 5], [0, 5], "must begin with 0"),
        ([0, 2, 5], [0, 5], "the same number of sequences"),
        ([0.0, 5.0], [0, 5], "int32 or int64"),
    ],
)
def test_offsets_that_do_not_fit(level, cuts_q, cuts_k, message):
    with at_level(level), pytest.raises(ValueError, match=message):
        ops.attention_varlen(X, X, X, torch.tensor(cuts_q), torch.tensor(cuts_k))


@pytest.mark.parametrize("place", PLACES)
def test_offsets_on_a_gpu_are_read_once_until_they_change(place):
    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    with at_place(place) as device:
        x, cuts = x.to(device), torch.tensor([0, 2, 5], device=device)
        first = ops.attention_varlen(x, x, x, cuts, cuts)
        copy = _on_host(cuts)
        assert copy is _on_host(cuts)
        assert torch.equal(ops.attention_varlen(x, x, x, copy, cuts), first)
        cuts[1] = 4
        assert torch.equal(
            ops.attention_varlen(x, x, x, cuts, cuts),
            ops.attention_varlen(x, x, x, cuts.clone(), cuts.clone()),
        )
        cuts[1] = 6
        with pytest.raises(ValueError, match="must ascend"):
            ops.attention_varlen(x, x, x, cuts, cuts)


def test_transforms():
    x = [t[..., :8].double() for t in inputs(torch.float32)]
    cuts = offsets(LENGTHS_Q), offsets(LENGTHS_K)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention_varlen(q, k, v, *cuts, enable_gqa=True, is_causal=True)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention_varlen(q, k, v, *cuts, enable_gqa=True, is_causal=True)

    assert_close(
        torch.func.jvp(f, tuple(x[:3]), tuple(x[3:6])),
        torch.func.jvp(exact, tuple(x[:3]), tuple(x[3:6])),
        1e-10,
    )
    many = [torch.stack((t, 2 * t)) for t in x[:3]]
    assert_close(torch.vmap(f)(*many), torch.stack([f(*(t[i] for t in many)) for i in range(2)]), 1e-12)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in x[:3]]
    assert_close(
        torch.autograd.grad(compiled(*leaves).square().sum(), leaves),
        torch.autograd.grad(exact(*leaves).square().sum(), leaves),
        1e-10,
    )

    def twice(find) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(find(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    assert_close(twice(f), twice(exact), 1e-10)
