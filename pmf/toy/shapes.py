"""Points in the plane, and the embedding of the plane in D dimensions.

Every shape is centred and scaled analytically so that the mean variance of the coordinates is 1: distances
are in units of the data's standard deviation.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pmf.defaults import normal, uniform, whole_numbers

__all__ = ["SHAPES", "draw_plane", "draw_points"]


def _spiral(count: int, generator: torch.Generator) -> Tensor:
    """Swiss roll from the end: one and a half turns of (a cos a, a sin a), without noise."""
    angle = math.pi * (1.5 + 3 * uniform(count, generator=generator))
    points = angle * torch.stack((angle.cos(), angle.sin()))
    # Integrals over the angle: the mean is (2, 2 / 3 pi), and E a^2 is 9.75 pi^2.
    centre = torch.tensor([2, 2 / (3 * math.pi)], dtype=torch.float32, device="cpu")
    variance = (9.75 * math.pi**2 - float(centre.square().sum())) / 2
    return (points.T - centre) / math.sqrt(variance)


def _moons(count: int, generator: torch.Generator) -> Tensor:
    """Two interleaved half circles with Gaussian noise."""
    noise = 0.05
    angle = math.pi * uniform(count, generator=generator)
    is_upper = uniform(count, generator=generator) < 0.5
    x = torch.where(is_upper, angle.cos(), 1 - angle.cos())
    y = torch.where(is_upper, angle.sin(), 0.5 - angle.sin())
    points = torch.stack((x, y), 1) + noise * normal(count, 2, generator=generator)
    # Var x = 3/4; Var y = 1/2 + 1/16 - 1/pi, as the mean of sin over half a turn is 2 / pi.
    variance = (0.75 + 0.5625 - 1 / math.pi) / 2 + noise**2
    return (points - torch.tensor([0.5, 0.25], dtype=torch.float32, device="cpu")) / math.sqrt(variance)


def _checkerboard(count: int, generator: torch.Generator) -> Tensor:
    """Alternate squares of a four-by-four board, uniformly filled."""
    x = 4 * uniform(count, generator=generator) - 2
    row = 2 * whole_numbers(2, count, generator=generator) + x.floor() % 2
    y = uniform(count, generator=generator) + row - 2
    return torch.stack((x, y), 1) / math.sqrt(4 / 3)  # each coordinate is uniform in [-2, 2]


def _gaussians(count: int, generator: torch.Generator) -> Tensor:
    """Eight Gaussians around the unit circle."""
    width = 0.1
    angle = math.pi / 4 * whole_numbers(8, count, generator=generator).float()
    points = torch.stack((angle.cos(), angle.sin()), 1)
    points = points + width * normal(count, 2, generator=generator)
    return points / math.sqrt(0.5 + width**2)


def _rings(count: int, generator: torch.Generator) -> Tensor:
    """Two rings of radius 1 and 1/2 with equally many points."""
    noise = 0.03
    angle = 2 * math.pi * uniform(count, generator=generator)
    radius = (1 + whole_numbers(2, count, generator=generator).float()) / 2
    points = torch.stack((radius * angle.cos(), radius * angle.sin()), 1)
    points = points + noise * normal(count, 2, generator=generator)
    return points / math.sqrt((1 + 0.25) / 4 + noise**2)


SHAPES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "spiral": _spiral,
    "moons": _moons,
    "checkerboard": _checkerboard,
    "gaussians": _gaussians,
    "rings": _rings,
}
"""Shapes by name."""


def draw_points(shape: str, count: int, generator: torch.Generator) -> Tensor:
    """Draw points [count, 2] of a shape, float32, with mean 0 and mean variance 1."""
    return SHAPES[shape](count, generator)


def draw_plane(dim: int, generator: torch.Generator) -> Tensor:
    """Orthonormal basis [D, 2] of a random plane in D dimensions: points [N, 2] map to points @ basis.T."""
    basis, _ = torch.linalg.qr(normal(dim, 2, generator=generator))
    return basis
