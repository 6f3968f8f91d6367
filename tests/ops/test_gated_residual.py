"""gated_residual against float64: every level and dtype, any strides and gates, tangents of some samples."""

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
from helpers.levels import EVERYWHERE
from hypothesis import given
from hypothesis import strategies as st

from pmf import kernels
from pmf.ops import gated_residual, gated_residual_jvp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_accuracy(name: str, dtype: torch.dtype) -> None:
    shape = (3, 67, 203)
    x, b, g, x_t, b_t, g_t = (t.to(dtype) for t in normal(shape, shape, (203,), shape, shape, (203,)))
    check(name, "gated_residual", (x, b, g), (x_t, b_t, g_t))
    check(name, "gated_residual", (x, b, g), (x_t, b_t, None))


@few_examples
@given(levels(), dtypes(), *[layouts()] * 3, st.integers(0, 4), *[st.integers(1, n) for n in (4, 9, 140)])
def test_shapes_strides_and_gates(level, dtype, a, b, c, kind, batch, tokens, width) -> None:
    shape = (batch, tokens, width)
    gates = ((width,), (1, 1, width), (batch, 1, width), (batch, tokens, width), (1, 1, width))
    tensors = normal(shape, shape, gates[kind], shape, shape, gates[kind])
    x, branch, gate, x_t, branch_t, gate_t = (t.to(dtype) for t in tensors)
    x, branch, branch_t = LAYOUTS[a](x), LAYOUTS[b](branch), LAYOUTS[c](branch_t)
    check(level, "gated_residual", (x, branch, gate), (x_t, branch_t, gate_t), terms=FEW_TERMS)


@pytest.mark.parametrize("gate", [(1, 1, 5), (3, 1, 5), (5,)])
def test_the_reference_in_the_kernels_place_takes_every_gate(
    gate: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_references", frozenset({"gated_residual"}))
    shape = (3, 2, 5)
    x, b, g, x_t, b_t, g_t = (t.double() for t in normal(shape, shape, gate, shape, shape, gate))
    check("portable", "gated_residual", (x, b, g), (x_t, b_t, g_t))


@pytest.mark.parametrize(
    ("gate", "dim"), [((1, 1, 5), None), ((5, 1, 5), None), ((3, 1, 1, 5), 0), ((1, 3, 1, 5), 1), ((3, 5), 0)]
)
def test_vmap_of_every_gate(gate: tuple[int, ...], dim: int | None) -> None:
    x, b, x_t, b_t = normal(*[(3, 5, 2, 5)] * 4)
    g, g_t = normal(gate, gate)
    y, y_t = torch.vmap(gated_residual_jvp, (0, 0, dim, 0, 0, dim))(x, b, g, x_t, b_t, g_t)
    for i in range(3):
        one, one_t = (t if dim is None else t.select(dim, i) for t in (g, g_t))
        torch.testing.assert_close(y[i], x[i] + one * b[i])
        torch.testing.assert_close(y_t[i], x_t[i] + one * b_t[i] + one_t * b[i])


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0), (0,)])
def test_empty(shape: tuple[int, ...]) -> None:
    x, gate = torch.zeros(shape, requires_grad=True), torch.ones(shape[-1], requires_grad=True)
    y, y_t = gated_residual_jvp(x, x.detach(), gate, x.detach(), x.detach(), gate.detach())
    assert y.shape == y_t.shape == shape
    (y.sum() + y_t.sum()).backward()
    assert x.grad is not None and x.grad.shape == shape
    assert torch.equal(gate.grad, torch.zeros_like(gate))  # type: ignore[arg-type]


@pytest.mark.parametrize("gate_shape", [(33,), (1, 1, 33)])
def test_first_samples(gate_shape: tuple[int, ...]) -> None:
    x, b, x_t, b_t = (t.float() for t in normal(*((4, 5, 33),) * 4))
    (gate,) = (t.float() for t in normal(gate_shape, seed=2))
    check_first_samples("gated_residual", (x, b, gate), (x_t, b_t, None), shared={2})


def test_first_samples_with_a_gate_each() -> None:
    x, b, x_t, b_t = (t.float() for t in normal(*((4, 5, 33),) * 4))
    (gate,) = (t.float() for t in normal((4, 1, 33), seed=2))
    check_first_samples("gated_residual", (x, b, gate), (x_t, b_t, None), shared=set())


def test_bitwise_repeatable(threads: None) -> None:
    shape = (8, 276, 96)
    x, b, g, x_t, b_t, g_t = (t.float() for t in normal(shape, shape, (96,), shape, shape, (96,)))
    check_repeatable("gated_residual", (x, b, g), (x_t, b_t, g_t))


@pytest.mark.parametrize("dtype", DTYPES)
def test_closed_gate_passes_everything(dtype: torch.dtype) -> None:
    """Gates are zero at the start of training: the block is then exactly the identity."""
    x, b, x_t, b_t = (t.to(dtype) for t in normal(*((2, 5, 33),) * 4))
    y, y_t = gated_residual_jvp(x, b, torch.zeros(33, dtype=dtype), x_t, b_t)
    assert torch.equal(y, x) and torch.equal(y_t, x_t)


@pytest.mark.parametrize(
    ("x", "branch", "gate", "message"),
    [
        (torch.ones(2, 3, 8), torch.ones(2, 3, 8), torch.ones(7), r"gate must be \[D\]"),
        (torch.ones(2, 3, 8), torch.ones(2, 3, 8), torch.ones(1, 3, 8), r"gate must be \[D\]"),
        (torch.ones(2, 3, 8), torch.ones(2, 3, 8), torch.ones(3, 8), r"gate must be \[D\]"),
        (torch.ones(2, 8), torch.ones(3, 8), torch.ones(8), "must have the shape of"),
        (torch.ones(2, 8), torch.ones(2, 8), torch.ones(8, dtype=torch.float64), "gate must have the dtype"),
        (torch.ones(()), torch.ones(()), torch.ones(1), r"x and branch must be \[..., D\]"),
    ],
)
def test_bad_input(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match="gated_residual: .*" + message):
        gated_residual(x, branch, gate)


def test_bad_tangent() -> None:
    x = torch.ones(2, 5)
    with pytest.raises(ValueError, match="gated_residual_jvp: x_t must have the shape of"):
        gated_residual_jvp(x, x, torch.ones(5), torch.ones(2, 4), torch.ones(2, 4))
