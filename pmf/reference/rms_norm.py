"""Root-mean-square normalisation (Zhang and Sennrich, 2019) and its tangent.

    s = rsqrt(mean x^2 + eps)      n = x s      y = n w
    g = tx s      tn = g - n mean(n g)      ty = tn w + n tw

The mean is over the last dimension. No term of tn grows like x^2, so large inputs lose no accuracy.
"""

import torch
from torch import Tensor

__all__ = ["rms_norm", "rms_norm_jvp"]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """y = w x / sqrt(mean x^2 + eps) for x [..., D] and weight [D]."""
    n, _ = normalise(x, eps)
    return n * weight


def rms_norm_jvp(
    x: Tensor, weight: Tensor, x_t: Tensor | None, weight_t: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(y, ty): rms_norm and its directional derivative along (x_t, weight_t); None is a zero tangent."""
    n, s = normalise(x, eps)
    y_t = torch.zeros_like(x)
    if x_t is not None:
        y_t = y_t + normalise_t(n, s, x_t) * weight
    if weight_t is not None:
        y_t = y_t + n * weight_t
    return n * weight, y_t


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """n = x s and s = rsqrt(mean x^2 + eps)."""
    s = torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return x * s, s


def normalise_t(n: Tensor, s: Tensor, x_t: Tensor) -> Tensor:
    """tn = g - n mean(n g) with g = tx s: exact for any eps."""
    g = x_t * s
    return g - n * (n * g).mean(-1, keepdim=True)
