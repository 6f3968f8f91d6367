"""The straight path between image and noise, z = (1 - t) x + t e."""

from torch import Tensor

__all__ = ["T_FLOOR", "conditional_velocity", "interpolate", "over_pixels", "per_sample"]

T_FLOOR = 0.05
"""Lower bound on times where a velocity divides by t."""


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z = (1 - t) x + t e for data x, e [B, ...] and t [B]."""
    t = per_sample(t, x)
    return (1 - t) * x + t * noise


def conditional_velocity(z: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """(z - x) / clip(t, 0.05, 1), which equals e - x for t >= 0.05."""
    return (z - x) / per_sample(t.clamp(T_FLOOR, 1.0), x)


def over_pixels(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Reshape [B] to [B, 1, ...], with as many dimensions as x."""
    return values.reshape(-1, *(1,) * (x.dim() - 1))
