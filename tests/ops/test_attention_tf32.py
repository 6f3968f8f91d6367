"""TF32 products in float32 attention: limits equal the inherent loss, and the kernels meet them.

Inherent loss: float64, with the values passed from one product to the next rounded to TF32. Inputs are TF32
numbers.
"""

from collections.abc import Iterator

import pytest
import torch
from helpers.attention import HARD, Problem, Shape, gradients, gradients_of_both, problem, solved
from helpers.levels import CPU_LEVELS, EVERYWHERE, at_level
from helpers.tolerance import TF32, assert_close, error, round_to_tf32, spread, tolerance
from torch import Tensor

from pmf import _library, ops

SHAPE = Shape(1, 4, 4, 276, 276, 64, 64)
SMALL = Shape(1, 2, 2, 17, 65, 64, 64)


def rounded(name: str, shape: Shape) -> Problem:
    return HARD[name](problem(shape)).map(round_to_tf32)


def total(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    q, k, v, q_t, k_t, v_t = p[:6]
    scale = q.shape[-1] ** -0.5
    scores, scores_t = scale * q @ k.mT, scale * (q_t @ k.mT + q @ k_t.mT)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    pivot = total(weights * scores_t) / total(weights)
    prob, moved = round_to_tf32(weights), round_to_tf32(weights * (scores_t - pivot))
    out = prob @ v / total(prob)
    return out, (moved @ v + prob @ v_t) / total(prob) - total(moved) / total(prob) * out


def backward(p: Problem, grad_t: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and of their tangents."""
    q, k, v, q_t, k_t, v_t, grad, _ = p
    scale = q.shape[-1] ** -0.5
    prob = (scale * q @ k.mT).softmax(-1)
    scores_t = scale * (q_t @ k.mT + q @ k_t.mT)
    moved = scores_t - total(prob * scores_t)
    through_t, through = grad_t @ v.mT, grad @ v.mT + grad_t @ v_t.mT
    centred = through_t - total(prob * through_t)
    both = through + moved * centred
    ds_t, ds = round_to_tf32(prob * centred), round_to_tf32(prob * (both - total(prob * both)))
    mean, mean_t = k.mean(-2, keepdim=True), k_t.mean(-2, keepdim=True)
    return (
        scale * (ds @ k + ds_t @ k_t - total(ds) * mean - total(ds_t) * mean_t),
        scale * (ds.mT @ q + ds_t.mT @ q_t),
        round_to_tf32(prob).mT @ grad + round_to_tf32(prob * moved).mT @ grad_t,
        scale * (ds_t @ k - total(ds_t) * mean),
        scale * ds_t.mT @ q,
        round_to_tf32(prob).mT @ grad_t,
    )


def test_limits_are_those_of_the_mathematics():
    """Satisfied in every case, and at most a quarter above the worst."""
    values, grads = [], []
    for name in HARD:
        p = rounded(name, SHAPE)
        _, exact, plain, both = solved(p)
        values += [error(a, e) for a, e in zip(forward(p), exact, strict=True)]
        for found, expected in ((backward(p, 0 * p.grad_t)[:3], plain), (backward(p, p.grad_t), both)):
            grads += [error(a, e) for a, e in zip(found, expected, strict=True)]
    for kind, errors in (("attention", values), ("attention gradient", grads)):
        assert 0.8 * tolerance(kind, TF32) < max(errors) < tolerance(kind, TF32), kind


@pytest.fixture(params=[level for level in EVERYWHERE if level not in CPU_LEVELS])
def allowed(request: pytest.FixtureRequest) -> Iterator[None]:
    """A level with TF32 products, enabled in PyTorch."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with at_level(request.param):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["plain", "late sinks, common key tangent, large value mean"])
def test_kernels(allowed, name: str):
    exact = solved(rounded(name, SMALL))
    p = exact.problem.to(torch.float32)
    few = 1 + 3 * (max(map(spread, exact.gradients)) - 1)
    values = ops.attention_jvp(*p[:6])
    assert_close(values, exact.values, few * tolerance("attention", TF32))
    assert error(values[1], exact.values[1]) > tolerance("attention", torch.float32)  # it is TF32
    assert_close(gradients(ops, p), exact.gradients, few * tolerance("attention gradient", TF32))
    both = gradients_of_both(ops, p)
    assert_close(both, exact.gradients_of_both, few * tolerance("attention gradient", TF32))


@pytest.mark.parametrize(("chosen", "allows"), [("tf32", True), ("ieee", False)])
def test_either_of_torchs_switches_is_followed(chosen: str, allows: bool):
    """After the newer one torch.get_float32_matmul_precision() raises: ops failed, even on the CPU."""
    p = [torch.randn(1, 1, 4, 8) for _ in range(3)]
    before = torch.get_float32_matmul_precision()
    try:
        torch.backends.cuda.matmul.fp32_precision = chosen
        assert _library.allow_tf32() is allows
        ops.attention(*p)
        torch.set_float32_matmul_precision("high" if allows else "highest")
        assert _library.allow_tf32() is allows
    finally:
        torch.set_float32_matmul_precision(before)
