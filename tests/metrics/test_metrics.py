"""Frechet distance, recall and coverage in cases with known values."""

import pytest
import torch

from pmf.metrics import coverage, frechet_distance, recall


def test_frechet_of_shifted_and_scaled_sets_is_the_closed_form():
    a = torch.randn(500, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, a + 2) == pytest.approx(5 * 4, rel=1e-10)
    # b = s (a - mean) + mean: tr(C + s^2 C - 2 s C) = (1 - s)^2 tr C
    scaled = (a - a.mean(0)) * 3 + a.mean(0)
    assert frechet_distance(a, scaled) == pytest.approx(4 * torch.cov(a.T).trace().item(), rel=1e-10)


def test_frechet_accepts_singular_covariances():
    a = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    a[:, 1] = a[:, 0]
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_recall_and_coverage_of_collapsed_copied_and_far_samples():
    real = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    assert recall(real, real) == coverage(real, real) == 1.0
    assert recall(real, real + 100) == coverage(real, real + 100) == 0.0
    collapsed = real[:1] + 1e-6 * torch.randn(400, 3, generator=torch.Generator().manual_seed(1))
    assert recall(real, collapsed) <= 1 / 400
    assert coverage(real, collapsed) < 0.05


def test_wide_noise_raises_recall_but_not_coverage():
    """Why both are reported: noisy samples reach every real point with their larger balls."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 16, generator=generator)
    fresh = torch.randn(400, 16, generator=generator)
    noisy = fresh + 2 * torch.randn(400, 16, generator=generator)
    assert recall(real, noisy) >= recall(real, fresh)
    assert coverage(real, noisy) < coverage(real, fresh)


@pytest.mark.parametrize("metric", [recall, coverage])
def test_bad_arguments_are_named(metric):
    with pytest.raises(ValueError, match=f"{metric.__name__}: both sets must be"):
        metric(torch.zeros(10, 3), torch.zeros(10, 4))
    with pytest.raises(ValueError, match=f"{metric.__name__}: k must be"):
        metric(torch.zeros(10, 3), torch.zeros(10, 3), k=10)
    broken = torch.eye(10).index_fill(0, torch.tensor([4]), float("nan"))
    for pair in ((broken, torch.eye(10)), (torch.eye(10), broken)):
        with pytest.raises(ValueError, match=f"{metric.__name__}: the features must be finite"):
            metric(*pair)


def test_frechet_refuses_bad_features():
    with pytest.raises(ValueError, match="must be"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(torch.full((4, 2), float("nan")), torch.zeros(4, 2))
