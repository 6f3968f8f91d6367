"""The SwiGLU gate (Shazeer, 2020) and its tangent.

s = sigmoid(g)      y = g s u
ty = (s + g s (1 - s)) tg u + g s tu
"""

import torch
from torch import Tensor

__all__ = ["swiglu", "swiglu_jvp"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) up, elementwise."""
    return gate * torch.sigmoid(gate) * up


def swiglu_jvp(gate: Tensor, up: Tensor, gate_t: Tensor | None, up_t: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y, ty): swiglu and its directional derivative along (gate_t, up_t); None is a zero tangent."""
    s = torch.sigmoid(gate)
    silu = gate * s
    y_t = torch.zeros_like(gate)
    if gate_t is not None:
        y_t = y_t + (s + silu * (1 - s)) * gate_t * up
    if up_t is not None:
        y_t = y_t + silu * up_t
    return silu * up, y_t
