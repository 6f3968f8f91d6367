"""Sliced Wasserstein distance between two sets of points in the plane."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sliced_wasserstein(a: Tensor, b: Tensor, num_projections: int = 128, order: float = 2.0) -> float:
    r"""Wasserstein distance of one-dimensional projections, averaged over all directions.

    .. math:: \Bigl(\frac1K \sum_{k<K} \int_0^1 |A_k(q) - B_k(q)|^p \, dq\Bigr)^{1/p}, \qquad
        d_k = (\cos \tfrac{\pi k}{K}, \sin \tfrac{\pi k}{K})

    where A_k and B_k are the quantile functions of the points projected on d_k. The integral is exact: sets
    of equal size are sorted and matched; for different sizes the steps are merged. In the plane, evenly
    spaced directions need no sampling: a shift by s gives exactly |s| / sqrt(2) at order 2, for any K of at
    least 2.

    Args:
        a, b: ``[N, 2]`` and ``[M, 2]`` points, any floating dtype (computed in float64).
        num_projections: K, the number of directions.
        order: p, at least 1.

    Returns:
        The distance, in units of the points. 0 for equal sets.

    Raises:
        ValueError: if the shapes do not fit, an option is out of range or a value is not finite.

    Source: Rabin et al. 2011, "Wasserstein Barycenter and its Application to Texture Mixing".
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != 2 or b.shape[1] != 2 or not len(a) or not len(b):
        raise ValueError(
            "sliced_wasserstein: both sets must be [N, 2] with N > 0, "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    if num_projections < 1 or not 1 <= order < math.inf:
        raise ValueError(
            "sliced_wasserstein: num_projections and order must be at least 1 and finite, "
            f"got {num_projections} and {order}"
        )
    a, b = a.double(), b.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("sliced_wasserstein: the points must be finite")
    angles = torch.arange(num_projections, dtype=a.dtype, device=a.device) * (math.pi / num_projections)
    directions = torch.stack((angles.cos(), angles.sin()))
    a, b = ((points @ directions).sort(dim=0).values for points in (a, b))
    if len(a) == len(b):
        costs = (a - b).abs().pow(order).mean(0)
    else:
        widths, in_a, in_b = _common_steps(len(a), len(b), a.device)
        costs = widths @ (a[in_a] - b[in_b]).abs().pow(order)
    return float(costs.mean() ** (1 / order))


def _common_steps(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The intervals of [0, 1] on which the quantile functions of n and of m points are both constant.

    Returns their widths, and the indices of the sorted values of each set on them. Edges are computed in
    units of 1 / (n m), in which they are integers.
    """
    in_a, in_b = (torch.arange(size + 1, device=device) for size in (n, m))
    edges = torch.cat((in_a * m, in_b * n)).unique()
    starts = edges[:-1]
    return edges.diff().double() / (n * m), starts // m, starts // n
