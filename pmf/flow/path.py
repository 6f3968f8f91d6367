"""The straight path between image and noise, z = (1 - t) x + t e."""

from torch import Tensor

__all__ = ["T_FLOOR", "conditional_velocity", "interpolate", "over_pixels"]

T_FLOOR = 0.05
"""Times are clipped from below by this where a velocity divides by t."""


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z = (1 - t) x + t e for images x, e [B, C, H, W] and t [B]."""
    t = over_pixels(t)
    return (1 - t) * x + t * noise


def conditional_velocity(z: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """(z - x) / clip(t, 0.05, 1), which is e - x from t = 0.05 on."""
    return (z - x) / over_pixels(t.clamp(T_FLOOR, 1.0))


def over_pixels(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]
