"""Tokens to images."""

import math

import torch
from torch import Tensor, nn

from pmf.reference.patch_velocity import to_images

from . import tangent
from .norm import RMSNorm

__all__ = ["FinalLayer"]


class FinalLayer(nn.Module):
    """RMSNorm, Linear to p p C pixels per token (initially zero), tokens [B, N, D] -> image [B, C, H, W].

    grid: rows and columns of tokens; by default equal.
    """

    def __init__(
        self, hidden_size: int, patch_size: int, channels: int, grid: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.patch_size, self.channels, self.grid = patch_size, channels, grid
        self.norm = RMSNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * channels)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        self.linear.weight.zero_()
        self.linear.bias.zero_()

    def forward(
        self, x: Tensor, x_t: Tensor | None = None, *, as_tokens: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, N, D] -> image [B, C, H, W], or as_tokens its pixels [B, N, p p C]; x_t [n, N, D] or None."""
        y, y_t = self.norm(x, x_t)
        y, y_t = tangent.linear(self.linear, y, y_t)
        if as_tokens:
            return y, y_t
        return self._to_image(y), None if y_t is None else self._to_image(y_t)

    def _to_image(self, tokens: Tensor) -> Tensor:
        rows, columns = self.grid or (math.isqrt(tokens.shape[1]),) * 2
        return to_images(tokens, self.channels, rows * self.patch_size, columns * self.patch_size)
