"""Sliding windows of attention, and log-sum-exp: values, tangents, gradients."""

from collections.abc import Iterator

import pytest
import torch
from helpers import emulator
from helpers.attention import Problem, Shape, problem
from helpers.levels import CPU_LEVELS, EMULATED, EVERYWHERE, at_level
from helpers.tolerance import assert_close, tolerance
from torch import Tensor

from pmf import ops, reference

SHAPES = (Shape(1, 4, 2, 130, 210, 24, 40), Shape(2, 2, 2, 230, 90, 16, 16))
WINDOWS = ((5, 7), (0, 0), (None, 3), (70, -1), (100, 0), (0, 1000))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
GPU_LEVELS = [x for x in EVERYWHERE if x not in CPU_LEVELS]


@pytest.fixture(params=CPU_LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with at_level(request.param):
        yield request.param


def as_mask(window, shape: Shape, is_causal: bool = False) -> Tensor:
    left, right = (1 << 30 if x in (None, -1) else x for x in window)
    ahead = torch.arange(shape.keys) - torch.arange(shape.queries)[:, None]
    return (ahead >= -left) & (ahead <= (min(right, 0) if is_causal else right))


def with_lse(attention_jvp, p: Problem, **options) -> list[Tensor]:
    """(O, tO, lse, lse_t), and the gradients of all six inputs through all four."""
    leaves = [x.detach().requires_grad_() for x in p[:6]]
    outputs = attention_jvp(*leaves, **options, return_lse=True)
    shown = [x.masked_fill(x.isinf(), 0) for x in outputs]  # rows that see nothing have lse = -inf
    g = torch.Generator().manual_seed(9)
    rows = [torch.randn(outputs[2].shape, generator=g, dtype=torch.float64).to(x.dtype) for x in outputs[2:]]
    return [x.detach() for x in shown] + list(torch.autograd.grad(shown, leaves, [p.grad, p.grad_t, *rows]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_windows_are_masks(level, is_causal, window, shape, dtype):
    check_window(is_causal, window, shape, dtype)


@pytest.mark.parametrize("level", GPU_LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [(5, 7), (None, 3), (50, -1), (0, 1000)])
def test_windows_on_a_gpu(level, window, dtype):
    with at_level(level):
        check_window(window == (5, 7), window, Shape(1, 2, 1, 70, 110, 24, 40), dtype)


def check_window(is_causal, window, shape, dtype):
    p = problem(shape).to(dtype)
    exact = with_lse(
        reference.attention_jvp,
        p.to(torch.float64),
        attn_mask=as_mask(window, shape, is_causal),
        enable_gqa=True,
    )
    actual = with_lse(ops.attention_jvp, p, window=window, is_causal=is_causal, enable_gqa=True)
    few = 4  # with windows of one key, gradients are only rounding errors
    assert_close(actual[:4], exact[:4], few * tolerance("attention", dtype))
    assert_close(actual[4:], exact[4:], few * tolerance("attention gradient", dtype))


@pytest.mark.skipif("emulated" not in EMULATED, reason="counts the emulator's instructions")
def test_cuda_kernels_skip_tiles_outside_the_window():
    """Forward, both outputs and all gradients: at most the tiles that a block of 96 rows can see."""
    tokens, before, after, tile, rows = 320, 3, 4, 32, 96
    p = problem(Shape(1, 1, 1, tokens, tokens, 64, 64)).to(torch.bfloat16)

    def products(**options) -> int:
        begin = emulator.products()
        with_lse(ops.attention_jvp, p, **options)
        return emulator.products() - begin

    with at_level("emulated"):
        share = products(window=(before, after)) / products(window=(tokens, tokens))
    most = (rows + before + after + tile) / tokens
    assert 0.05 < share < most


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_without_a_window_and_with_a_mask(level, dtype):
    check_lse(SHAPES[0], dtype)


@pytest.mark.parametrize("level", GPU_LEVELS)
@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 64), (torch.float16, 80), (torch.float32, 24)])
def test_lse_on_a_gpu(level, dtype, width):
    """Also at the widths of kernels for calls without masks."""
    with at_level(level):
        check_lse(Shape(1, 2, 2, 40, 70, width, width), dtype)


def check_lse(shape, dtype):
    p = problem(shape).to(dtype)
    mask = torch.rand(shape.queries, shape.keys, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[3:9] = False
    for options in ({}, {"attn_mask": mask}):
        exact = with_lse(reference.attention_jvp, p.to(torch.float64), enable_gqa=True, **options)
        actual = with_lse(ops.attention_jvp, p, enable_gqa=True, **options)
        assert_close(actual[:4], exact[:4], tolerance("attention", dtype))
        assert_close(actual[4:], exact[4:], tolerance("attention gradient", dtype))
    out, lse = ops.attention(*p[:3], mask, enable_gqa=True, return_lse=True)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (lse[:, :, 3:9] == -torch.inf).all()
    assert torch.equal(out, ops.attention(*p[:3], mask, enable_gqa=True))


def merged(parts: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Combine attention over parts of the keys to that over all: O, and with tangents tO."""
    lse = torch.logsumexp(torch.stack([part[-1] for part in parts]), 0)
    weights = [(part[-1] - lse).exp()[..., None].to(part[0].dtype) for part in parts]
    return sum(w * part[0] for w, part in zip(weights, parts, strict=True))


def test_chunks_of_keys_add_up_as_in_a_ring():
    """Values, tangents by forward mode through the sum, and gradients of both."""
    p = problem(Shape(2, 3, 3, 70, 130, 16, 16))
    cut = [slice(0, 50), slice(50, 130)]

    def ring(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return merged([ops.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in cut])

    assert_close(ring(*p[:3]), ops.attention(*p[:3]), 1e-12)
    both = torch.func.jvp(ring, tuple(p[:3]), tuple(p[3:6]))
    assert_close(both, ops.attention_jvp(*p[:6]), 1e-12)

    def explicit(*x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            ops.attention_jvp(
                x[0], x[1][:, :, s], x[2][:, :, s], x[3], x[4][:, :, s], x[5][:, :, s], return_lse=True
            )
            for s in cut
        ]
        lse = torch.logaddexp(parts[0][2], parts[1][2])
        weights = [(part[2] - lse).exp()[..., None] for part in parts]
        lse_t = sum(w[..., 0] * part[3] for w, part in zip(weights, parts, strict=True))
        out = sum(w * part[0] for w, part in zip(weights, parts, strict=True))
        out_t = sum(
            w * (part[1] + (part[3] - lse_t)[..., None] * part[0])
            for w, part in zip(weights, parts, strict=True)
        )
        return out, out_t

    expected = None
    for find in (explicit, ops.attention_jvp):
        leaves = [x.clone().requires_grad_() for x in p[:6]]
        outputs = find(*leaves)
        assert_close([x.detach() for x in outputs], both, 1e-12)
        grads = torch.autograd.grad(outputs, leaves, (p.grad, p.grad_t))
        expected = grads if find is explicit else expected
        assert_close(grads, expected, 1e-10)


@pytest.mark.parametrize("level", [*CPU_LEVELS, *EMULATED])
def test_a_right_side_of_0_is_causal(level):
    p = problem(SHAPES[0]).to(torch.float32)

    def everything(**options) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in p[:6]]
        outputs = ops.attention_jvp(*leaves, **options, enable_gqa=True)
        return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, leaves, (p.grad, p.grad_t)))

    with at_level(level):
        causal, window = everything(is_causal=True), everything(window=(-1, 0))
    assert all(torch.equal(a, b) for a, b in zip(causal, window, strict=True))


@pytest.mark.parametrize("level", [*CPU_LEVELS, *EMULATED])
def test_keys_outside_of_every_window_may_be_nan(level):
    p = problem(Shape(1, 2, 2, 60, 200, 16, 16)).to(torch.float32)
    dirty = Problem(*(x.clone() for x in p))
    for x in (*dirty[1:3], *dirty[4:6]):
        x[:, :, 80:] = torch.nan
    with at_level(level):
        clean, actual = (with_lse(ops.attention_jvp, x, window=(8, 20)) for x in (p, dirty))
    assert all(torch.equal(a, c) for a, c in zip(actual, clean, strict=True))


@pytest.mark.parametrize("window", [(-2, 0), (1,), 5, (0.5, 1), (True, 1)])
def test_invalid_windows_are_rejected(window):
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"window must be \(left, right\)"):
        ops.attention(x, x, x, window=window)


def test_forward_mode_vmap_and_compile():
    p = problem(Shape(2, 2, 2, 40, 60, 8, 8)).to(torch.float32)

    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, v, window=(9, 4), return_lse=True)

    expected = ops.attention_jvp(*p[:6], window=(9, 4), return_lse=True)
    (out, lse), (out_t, lse_t) = torch.func.jvp(f, tuple(p[:3]), tuple(p[3:6]))
    assert_close((out, out_t, lse, lse_t), expected, 1e-6)
    assert_close(torch.vmap(f)(*p[:3]), expected[::2], 1e-6)
    assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(*p[:3]), expected[::2], 1e-6)
