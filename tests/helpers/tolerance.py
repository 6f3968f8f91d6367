"""Errors, and the limits for them: those of pmf.bench.tolerance, the one table."""

import torch
from torch import Tensor

from pmf.bench.tolerance import UNIT_ROUNDOFF, spread, tolerance

__all__ = ["UNIT_ROUNDOFF", "assert_close", "error", "spread", "tolerance"]


def error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; the absolute error where zero is expected."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert torch.isfinite(actual).all()
    distance = (actual.double() - expected.double()).norm().item()
    return distance / (expected.double().norm().item() or 1.0)


def assert_close(actual, expected, limit: float) -> None:
    """Every tensor of one result is within `limit` of the other."""
    actual, expected = _tuple(actual), _tuple(expected)
    assert len(actual) == len(expected)
    errors = [error(a, e) for a, e in zip(actual, expected, strict=True)]
    assert max(errors, default=0.0) <= limit, f"relative errors {errors}, limit {limit}"


def _tuple(x) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)
