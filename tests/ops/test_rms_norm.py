"""rms_norm against float64: every level and dtype, strides, tangents of some samples, extremes, bad input."""

import pytest
import torch
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
from helpers.levels import EVERYWHERE, LEVELS
from hypothesis import given
from hypothesis import strategies as st

from pmf.ops import rms_norm, rms_norm_jvp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_accuracy(name: str, dtype: torch.dtype) -> None:
    x, w, x_t, w_t = (t.to(dtype) for t in normal((3, 67, 203), (203,), (3, 67, 203), (203,)))
    check(name, "rms_norm", (x, w), (x_t, w_t))
    check(name, "rms_norm", (x, w), (x_t, None))


@few_examples
@given(levels(), dtypes(), layouts(), layouts(), st.integers(1, 4), st.integers(1, 9), st.integers(2, 140))
def test_shapes_and_strides(level, dtype, layout, layout_t, batch, tokens, width) -> None:
    x, w, x_t, w_t = normal((batch, tokens, width), (width,), (batch, tokens, width), (width,))
    x, x_t = LAYOUTS[layout](x.to(dtype)), LAYOUTS[layout_t](x_t.to(dtype))
    # eps keeps the norm of two elements from being nearly constant with a derivative near zero.
    check(level, "rms_norm", (x, w.to(dtype)), (x_t, w_t.to(dtype)), terms=FEW_TERMS, eps=0.5)


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 1, 3, 2, 7)])
def test_any_rank(shape: tuple[int, ...]) -> None:
    x, w, x_t, w_t = normal(shape, shape[-1:], shape, shape[-1:])
    check(LEVELS[-1], "rms_norm", (x, w), (x_t, w_t), eps=0.1)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0), (0,)])
def test_empty(shape: tuple[int, ...]) -> None:
    x, w = torch.zeros(shape, requires_grad=True), torch.ones(shape[-1], requires_grad=True)
    y, y_t = rms_norm_jvp(x, w, x.detach(), w.detach())
    assert y.shape == y_t.shape == shape
    (y.sum() + y_t.sum()).backward()
    assert x.grad is not None and x.grad.shape == shape
    assert torch.equal(w.grad, torch.zeros_like(w))  # type: ignore[arg-type]


def test_first_samples() -> None:
    x, w, x_t, w_t = (t.float() for t in normal((4, 5, 33), (33,), (4, 5, 33), (33,)))
    check_first_samples("rms_norm", (x, w), (x_t, None), shared={1})


def test_bitwise_repeatable(threads: None) -> None:
    x, w, x_t, w_t = (t.float() for t in normal((8, 276, 96), (96,), (8, 276, 96), (96,)))
    check_repeatable("rms_norm", (x, w), (x_t, w_t))


@pytest.mark.parametrize("name", EVERYWHERE)
def test_extremes(name: str) -> None:
    """The smallest and largest rows whose squares fit fp32, and rows of zeros, in value and tangent."""
    x, w, x_t = (t.float() for t in normal((3, 65), (65,), (3, 65)))
    scale = torch.tensor([[1e-15], [1e17], [1e3]])
    check(name, "rms_norm", (x * scale, w), (x_t * scale, None), terms=FEW_TERMS, eps=1e-12)
    y, y_t = rms_norm_jvp(torch.zeros(2, 65), w, x_t[:2])
    assert torch.equal(y, torch.zeros(2, 65))
    torch.testing.assert_close(y_t, x_t[:2] * w * 1e3)  # d/dx of w x / sqrt(eps) at 0, eps = 1e-6


def test_nan_poisons_only_its_row() -> None:
    x = torch.ones(3, 40)
    x[1, 7] = torch.nan
    y = rms_norm(x, torch.ones(40))
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 8), torch.ones(7), "weight must be a vector of the last dimension of x"),
        (torch.ones(2, 8), torch.ones(1, 8), "weight must be a vector"),
        (torch.ones(2, 8), torch.ones(8, dtype=torch.float64), "weight must have the dtype"),
        (torch.ones(()), torch.ones(1), r"x must be \[..., D\]"),
        (torch.ones(2, 8, dtype=torch.int64), torch.ones(8, dtype=torch.int64), "x must be float32"),
    ],
)
def test_bad_input(x: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match="rms_norm: " + message):
        rms_norm(x, weight)


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (2,)])
def test_bad_tangent(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rms_norm_jvp: x_t must have the shape of"):
        rms_norm_jvp(torch.ones(2, 5), torch.ones(5), torch.ones(shape))
