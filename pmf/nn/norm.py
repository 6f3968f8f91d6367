"""Root-mean-square normalisation as a layer."""

import torch
from torch import Tensor, nn

from . import tangent

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """y = w x / sqrt(mean x^2 + eps) over the last dimension, with w initially one."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, x_t: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return tangent.rms_norm(x, self.weight, x_t, self.eps)
