"""Diversity of samples from k-nearest-neighbour balls."""

from __future__ import annotations

import torch
from torch import Tensor


def _distances(a: Tensor, b: Tensor, name: str, k: int) -> Tensor:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{name}: both sets must be [N, D] with the same D, got {list(a.shape)} and {list(b.shape)}"
        )
    if not 0 < k < min(len(a), len(b)):
        raise ValueError(f"{name}: k must be at least 1 and below the size of both sets, got {k}")
    if not (a.isfinite().all() and b.isfinite().all()):  # nothing is near NaN: the score would be low
        raise ValueError(f"{name}: the features must be finite")
    # The matmul formulation loses small distances to cancellation.
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")


def _ball_radii(points: Tensor, name: str, k: int) -> Tensor:
    """The distance of each point to its k-th nearest neighbour in the same set."""
    distances = _distances(points, points, name, k).fill_diagonal_(float("inf"))
    return distances.kthvalue(k, dim=1).values


def recall(real: Tensor, samples: Tensor, k: int = 3) -> float:
    """Fraction of real points in the k-ball of at least one sample: how much of the data is reached.

    ``recall = mean_i [exists j: |real_i - sample_j| <= radius_k(sample_j)]``, the radius from the samples.

    Args:
        real, samples: ``[N, D]`` and ``[M, D]`` features, any floating dtype (computed in float64).
        k: which neighbour sets the radius.

    Raises:
        ValueError: if the shapes do not fit, k is out of range or a value is not finite.

    Source: Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models".
    """
    inside = _distances(real, samples, "recall", k) <= _ball_radii(samples, "recall", k)
    return float(inside.any(dim=1).double().mean())


def coverage(real: Tensor, samples: Tensor, k: int = 3) -> float:
    """Fraction of real points whose own k-ball contains a sample; unlike recall, not inflated by noise.

    ``coverage = mean_i [exists j: |real_i - sample_j| <= radius_k(real_i)]``, the radius from the real set.

    Args:
        real, samples: ``[N, D]`` and ``[M, D]`` features, any floating dtype (computed in float64).
        k: which neighbour sets the radius.

    Raises:
        ValueError: if the shapes do not fit, k is out of range or a value is not finite.

    Source: Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models".
    """
    inside = _distances(real, samples, "coverage", k) <= _ball_radii(real, "coverage", k)[:, None]
    return float(inside.any(dim=1).double().mean())
