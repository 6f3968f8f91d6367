"""Frechet distance between the Gaussians fitted to two sets of features."""

from __future__ import annotations

import torch
from torch import Tensor


def _symmetric_sqrt(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix; negative eigenvalues are rounding errors."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Squared 2-Wasserstein distance between the Gaussians fitted to ``a`` and ``b``.

    .. math:: \|\mu_a - \mu_b\|^2 + \mathrm{tr}\bigl(C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2}\bigr)

    Args:
        a: ``[N, D]`` features, N > 1, any floating dtype (computed in float64).
        b: ``[M, D]`` features.

    Returns:
        The distance, in squared units of the features. 0 for equal sets.

    Raises:
        ValueError: if the shapes do not fit or a value is not finite.

    Source: Dowson and Landau 1982; as an image metric, Heusel et al. 2017 (on Inception features; with any
    other features it must not be called FID).
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            "frechet_distance: both sets must be [N, D] with N > 1 and the same D, "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    a, b = a.double(), b.double()
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), torch.atleast_2d(torch.cov(x.T))) for x in (a, b))
    return frechet_of_moments(mean_a, cov_a, mean_b, cov_b)


def frechet_of_moments(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """`frechet_distance` between two Gaussians given by their moments: means ``[D]``, covariances ``[D, D]``.

    The covariances are sample covariances (divided by N - 1). Computed in float64. Raises ValueError like
    `frechet_distance`.
    """
    mean_a, cov_a, mean_b, cov_b = (x.double() for x in (mean_a, cov_a, mean_b, cov_b))
    size = mean_a.numel()
    if [x.shape for x in (mean_a, mean_b)] != [(size,)] * 2 or [x.shape for x in (cov_a, cov_b)] != [
        (size, size)
    ] * 2:
        shapes = ", ".join(str(list(x.shape)) for x in (mean_a, cov_a, mean_b, cov_b))
        raise ValueError(f"frechet_distance: moments must be [D], [D, D], [D], [D, D], got {shapes}")
    if not all(x.isfinite().all() for x in (mean_a, cov_a, mean_b, cov_b)):
        raise ValueError("frechet_distance: the features must be finite")
    root = _symmetric_sqrt(cov_a)
    # tr (C_a C_b)^{1/2} through a symmetric matrix: eigvalsh is accurate where a general square root is not.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance.clamp_min(0))
