"""One transformer block with a learned scale on each branch."""

import torch
from torch import Tensor, nn

from . import tangent
from .attention import Attention
from .mlp import SwiGLU
from .norm import RMSNorm

__all__ = ["Block"]


class Block(nn.Module):
    """x += attn_scale Attention(RMSNorm(x)); x += mlp_scale SwiGLU(RMSNorm(x)); scales zero at the start."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.attn_scale = nn.Parameter(torch.zeros(hidden_size))
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = SwiGLU(hidden_size, mlp_width)
        self.mlp_scale = nn.Parameter(torch.zeros(hidden_size))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal matrices of std 0.32 / sqrt(fan_in), norms one, scales zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, 0.32 * module.in_features**-0.5, generator=generator)
            elif isinstance(module, RMSNorm):
                module.reset_parameters()
        self.attn_scale.zero_()
        self.mlp_scale.zero_()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, x_t: Tensor | None = None, keep: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, N, D] -> [B, N, D]; cos, sin [P, D / H / 2] turn the last P tokens; x_t [n, N, D] or None.

        keep: compute the last that many tokens only, which still attend to all; the result is [B, keep, D].
        """
        y, y_t = self.norm1(x, x_t)
        y, y_t = self.attn(y, cos, sin, y_t, keep)
        if keep is not None:
            x, x_t = x[:, -keep:], None if x_t is None else x_t[:, -keep:]
        x, x_t = tangent.gated_residual(x, y, self.attn_scale, x_t, y_t)
        y, y_t = self.norm2(x, x_t)
        y, y_t = self.mlp(y, y_t)
        return tangent.gated_residual(x, y, self.mlp_scale, x_t, y_t)
