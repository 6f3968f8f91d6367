"""Per-head RMSNorm of queries and keys, then rotary embedding (Su et al., 2021), and the tangent of both.

    n = rms_norm(x, w)
    (a, b) -> (a cos - b sin, a sin + b cos) for each pair of adjacent elements (a, b) of n

The tables cos, sin [P, D/2] apply to the last P of the N tokens: the first N - P are normalised but not
rotated. Rotation is linear, so the norm's tangent is rotated in the same way.
"""

import torch
from torch import Tensor

from .rms_norm import rms_norm, rms_norm_jvp

__all__ = ["rotary_qk_norm", "rotary_qk_norm_jvp"]


def rotary_qk_norm(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Normalised and rotated query [B, H, N, D] and key [B, Hk, N, D]; weights [D]."""
    return (
        rotate(rms_norm(query, query_weight, eps), cos, sin),
        rotate(rms_norm(key, key_weight, eps), cos, sin),
    )


def rotary_qk_norm_jvp(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_t: Tensor | None,
    key_t: Tensor | None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, tq, tk): rotary_qk_norm and its derivative along (query_t, key_t); None is a zero tangent."""
    q, q_t = rms_norm_jvp(query, query_weight, query_t, None, eps)
    k, k_t = rms_norm_jvp(key, key_weight, key_t, None, eps)
    return rotate(q, cos, sin), rotate(k, cos, sin), rotate(q_t, cos, sin), rotate(k_t, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each adjacent pair in the last cos.shape[0] tokens of x [..., N, D] by its angle."""
    first = x.shape[-2] - cos.shape[0]
    a, b = x[..., first:, 0::2], x[..., first:, 1::2]
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((x[..., :first, :], turned), -2)
