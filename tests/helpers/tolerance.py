"""Errors and their limits, which come from the one table in pmf.check.tolerance."""

from collections.abc import Iterable

import torch
from torch import Tensor

from pmf.check.tolerance import TF32, UNIT_ROUNDOFF, spread, tolerance

__all__ = ["TF32", "UNIT_ROUNDOFF", "assert_close", "error", "round_to_tf32", "spread", "tolerance"]


def error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; the absolute error where zero is expected."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert torch.isfinite(actual).all()
    distance = (actual.double() - expected.double()).norm().item()
    return distance / (expected.double().norm().item() or 1.0)


def round_to_tf32(x: Tensor) -> Tensor:
    """The nearest numbers with a 10-bit mantissa, ties away from zero, in x's dtype."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(x.dtype)


def assert_close(
    actual: Tensor | Iterable[Tensor], expected: Tensor | Iterable[Tensor], limit: float
) -> None:
    """Check that every tensor of one result is within `limit` of the other."""
    errors = [error(a, e) for a, e in zip(_tuple(actual), _tuple(expected), strict=True)]
    assert max(errors, default=0.0) <= limit, f"relative errors {errors}, limit {limit}"


def _tuple(x: Tensor | Iterable[Tensor]) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)
