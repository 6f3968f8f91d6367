"""Tokens to an image, and the velocity from it to the noisy image (arXiv 2601.22158).

s = clip(t, floor, 1)      v = (z - x) / s
tv = (tz - tx) / s - v ts / s,  ts = tt inside the clip's bounds, else 0
"""

import math

import torch
from torch import Tensor

__all__ = ["patch_velocity", "patch_velocity_jvp", "to_images"]


def to_images(tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
    """[B, rows columns, p p C] -> [B, C, H, W]: tokens in row order, pixels within a token as (p, p, C)."""
    p = math.isqrt(tokens.shape[-1] // channels)
    pixels = tokens.reshape(-1, height // p, width // p, p, p, channels)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)


def patch_velocity(tokens: Tensor, images: Tensor, t: Tensor, floor: float = 0.05) -> Tensor:
    """(images - x) / clip(t, floor, 1): tokens [B, N, p p C], images [B, C, H, W], t [B]."""
    x = to_images(tokens, *images.shape[1:])
    return (images - x) / t.clamp(floor, 1.0)[:, None, None, None]


def patch_velocity_jvp(
    tokens: Tensor,
    images: Tensor,
    t: Tensor,
    tokens_t: Tensor | None,
    images_t: Tensor | None,
    t_t: Tensor | None,
    floor: float = 0.05,
) -> tuple[Tensor, Tensor]:
    """(v, tv): tangents of the first samples, or None for zero."""
    v = patch_velocity(tokens, images, t, floor)
    n = next((len(x) for x in (tokens_t, images_t, t_t) if x is not None), len(t))
    s = t[:n].clamp(floor, 1.0)[:, None, None, None]
    v_t = torch.zeros_like(images[:n])
    if images_t is not None:
        v_t = v_t + images_t / s
    if tokens_t is not None:
        v_t = v_t - to_images(tokens_t, *images.shape[1:]) / s
    if t_t is not None:
        moving = (t[:n] >= floor) & (t[:n] <= 1.0)
        v_t = v_t - v[:n] * (t_t * moving)[:, None, None, None] / s
    return v, v_t
