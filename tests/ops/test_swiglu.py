"""swiglu against float64: every level and dtype, strides, tangents of some samples, extremes, bad input."""

import pytest
import torch
import torch.nn.functional as F
from helpers.elementwise import (
    DTYPES,
    FEW_TERMS,
    LAYOUTS,
    check,
    check_first_samples,
    check_repeatable,
    dtypes,
    few_examples,
    layouts,
    levels,
    normal,
)
from helpers.levels import EVERYWHERE, at_level
from hypothesis import given
from hypothesis import strategies as st

from pmf.ops import swiglu, swiglu_jvp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_accuracy(name: str, dtype: torch.dtype) -> None:
    gate, up, gate_t, up_t = ((2 * t).to(dtype) for t in normal(*((3, 67, 203),) * 4))
    check(name, "swiglu", (gate, up), (gate_t, up_t))


@few_examples
@given(levels(), dtypes(), *[layouts()] * 4, st.integers(1, 4), st.integers(1, 9), st.integers(1, 140))
def test_shapes_and_strides(level, dtype, a, b, c, d, batch, tokens, width) -> None:
    tensors = normal(*((batch, tokens, width),) * 4)
    gate, up, gate_t, up_t = (
        LAYOUTS[layout](t.to(dtype)) for layout, t in zip((a, b, c, d), tensors, strict=True)
    )
    check(level, "swiglu", (gate, up), (gate_t, up_t), terms=FEW_TERMS)


def test_halves_of_one_buffer_without_a_copy() -> None:
    """Gate and up as the two halves of one product: the usual way to compute them."""
    (both,) = (t.float() for t in normal((2, 9, 66)))
    gate, up = both.chunk(2, -1)
    assert not gate.is_contiguous()
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0), (0,)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    y, y_t = swiglu_jvp(x, x.detach(), x.detach(), x.detach())
    assert y.shape == y_t.shape == shape
    (y.sum() + y_t.sum()).backward()
    assert x.grad is not None and x.grad.shape == shape


def test_first_samples() -> None:
    check_first_samples(
        "swiglu", normal((4, 5, 33), (4, 5, 33)), normal((4, 5, 33), (4, 5, 33), seed=2), shared=set()
    )


def test_bitwise_repeatable(threads: None) -> None:
    gate, up, gate_t, up_t = (t.float() for t in normal(*((8, 276, 96),) * 4))
    check_repeatable("swiglu", (gate, up), (gate_t, up_t))


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_tails(name: str, dtype: torch.dtype) -> None:
    """Relative accuracy where sigmoid or 1 - sigmoid is tiny: silu(-80) = -80 exp(-80)."""
    gate = torch.tensor([-80, -60, -30, -15, 0, 15, 30, 60, 80], dtype=dtype)
    one, zero = torch.ones_like(gate), torch.zeros_like(gate)
    with at_level(name):
        value, slope = swiglu_jvp(gate, one, one, zero)
    exact = gate.double().requires_grad_()
    expected = F.silu(exact)
    (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
    # The exponential's argument is rounded once: 80 u relative in its result, and as much again around it.
    limit = 160 * torch.finfo(dtype).eps
    torch.testing.assert_close(value.double(), expected.detach(), rtol=limit, atol=0)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=limit, atol=0)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_not_finite(name: str) -> None:
    gate = torch.tensor([torch.inf, torch.nan, 3e38, -3e38, 1e4, -1e4])
    with at_level(name):
        y = swiglu(gate, torch.ones_like(gate))
    assert y[0] == torch.inf and y[1].isnan()
    assert torch.equal(y[2:], F.silu(gate[2:]))


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.ones(2, 8), torch.ones(2, 7), "up must have the shape of gate"),
        (torch.ones(2, 8), torch.ones(8), "up must have the shape of gate"),
        (torch.ones(2, 8), torch.ones(2, 8, dtype=torch.float64), "up must have the dtype"),
        (torch.ones(()), torch.ones(()), r"gate must be \[..., D\]"),
        (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64), "gate must be float32"),
    ],
)
def test_bad_input(gate: torch.Tensor, up: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match="swiglu: " + message):
        swiglu(gate, up)


def test_bad_tangent() -> None:
    x = torch.ones(2, 5)
    with pytest.raises(ValueError, match="swiglu_jvp: gate_t must have the shape of"):
        swiglu_jvp(x, x, torch.ones(2, 4), torch.ones(2, 4))
