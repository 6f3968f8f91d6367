"""Sliced Wasserstein distance in cases with known values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmf.metrics import sliced_wasserstein

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**32)


def points(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, dtype=torch.float64, generator=generator)


@settings(max_examples=40, deadline=None)
@given(SIZES, SEEDS, st.floats(-10, 10), st.floats(-10, 10), st.integers(2, 50))
def test_a_shift_costs_its_mean_projection(count, seed, dx, dy, num_projections):
    a, shift = points(count, seed), torch.tensor([dx, dy], dtype=torch.float64)
    moved = sliced_wasserstein(a, a.flip(0) + shift, num_projections)
    assert moved == pytest.approx(math.hypot(dx, dy) / math.sqrt(2), abs=1e-9)
    angles = [math.pi * k / num_projections for k in range(num_projections)]
    shadows = [abs(dx * math.cos(angle) + dy * math.sin(angle)) for angle in angles]
    first_order = sliced_wasserstein(a, a + shift, num_projections, order=1)
    assert first_order == pytest.approx(sum(shadows) / num_projections, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, SEEDS, st.sampled_from([1.0, 2.0, 3.5]))
def test_it_is_symmetric_zero_on_equal_sets_and_grows_with_the_order(n, m, seed, order):
    a, b = points(n, seed), points(m, seed + 1)
    distance = sliced_wasserstein(a, b, order=order)
    assert distance == pytest.approx(sliced_wasserstein(b, a, order=order))
    assert sliced_wasserstein(a, a.flip(0), order=order) == pytest.approx(0, abs=1e-12)
    assert distance <= sliced_wasserstein(a, b, order=order + 1) + 1e-12


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), SEEDS, st.integers(2, 4))
def test_sets_of_different_sizes_are_compared_by_their_quantiles(n, m, seed, copies):
    """Repeating both to one size gives the same two distributions, for which sorting is enough."""
    a, b = points(n, seed), points(m, seed + 1)
    repeated = sliced_wasserstein(a.repeat(m * copies, 1), b.repeat(n * copies, 1))
    assert sliced_wasserstein(a, b) == pytest.approx(repeated, rel=1e-12)
    assert sliced_wasserstein(a, a.repeat(copies, 1)) == pytest.approx(0, abs=1e-12)


def test_one_point_against_two_is_the_value_computed_by_hand():
    a, b = torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [-3.0, 0.0]])
    # One direction, the x axis: half of the mass goes 1 far and half 3.
    assert sliced_wasserstein(a, b, num_projections=1, order=1) == pytest.approx(2)
    assert sliced_wasserstein(a, b, num_projections=1) == pytest.approx(math.sqrt(5))


def test_bad_arguments_are_named():
    plane = torch.zeros(3, 2)
    for other in (torch.zeros(3, 3), torch.zeros(0, 2), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"both sets must be \[N, 2\]"):
            sliced_wasserstein(plane, other)
    for options in ({"num_projections": 0}, {"order": 0.5}, {"order": math.inf}):
        with pytest.raises(ValueError, match="num_projections and order"):
            sliced_wasserstein(plane, plane, **options)
    with pytest.raises(ValueError, match="finite"):
        sliced_wasserstein(plane, torch.full((3, 2), math.nan))
