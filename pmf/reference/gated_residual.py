"""A residual branch with a learned gate (LayerScale; Touvron et al., 2021) and its tangent.

y = x + g b      ty = tx + g tb + tg b
"""

import torch
from torch import Tensor

__all__ = ["gated_residual", "gated_residual_jvp"]


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """y = x + gate branch for x, branch [..., D] and gate [D]."""
    return x + gate * branch


def gated_residual_jvp(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    x_t: Tensor | None,
    branch_t: Tensor | None,
    gate_t: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, ty): gated_residual and its directional derivative along the tangents; None is a zero tangent."""
    y_t = torch.zeros_like(x) if x_t is None else x_t
    if branch_t is not None:
        y_t = y_t + gate * branch_t
    if gate_t is not None:
        y_t = y_t + gate_t * branch
    return x + gate * branch, y_t
