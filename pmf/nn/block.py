"""A transformer block with a learned gate on each branch."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import AttentionBranch
from .mlp import MlpBranch
from .norm import RMSNorm

__all__ = ["Block", "checkpointed"]


class Block(nn.Module):
    """x += attn_scale Attention(RMSNorm(x)); x += mlp_scale SwiGLU(RMSNorm(x)); scales initially zero.

    In a network that only samples, the scales may be folded into the matrices named in `scaled`: they are
    then None.
    """

    scaled: ClassVar[dict[str, str]] = {"attn.out_proj.weight": "attn_scale", "mlp.w2.weight": "mlp_scale"}
    """The matrix whose rows each scale multiplies."""

    attn_scale: nn.Parameter | None
    mlp_scale: nn.Parameter | None

    def __init__(self, hidden_size: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attn = AttentionBranch(hidden_size, num_heads)
        self.attn_scale = nn.Parameter(torch.zeros(hidden_size))
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = MlpBranch(hidden_size, mlp_width)
        self.mlp_scale = nn.Parameter(torch.zeros(hidden_size))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal matrices with std 0.32 / sqrt(fan_in), norms one, scales zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, 0.32 * module.in_features**-0.5, generator=generator)
            elif isinstance(module, RMSNorm):
                module.reset_parameters()
        for scale in (self.attn_scale, self.mlp_scale):
            if scale is not None:
                scale.zero_()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, x_t: Tensor | None = None, keep: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, N, D] -> [B, N, D]; cos, sin [P, D / H / 2] rotate the last P tokens; x_t [n, N, D] or None.

        keep: compute only the last `keep` tokens, which still attend to all; the result is [B, keep, D].
        """
        x, x_t = self.attn(x, self.norm1, self.attn_scale, cos, sin, x_t, keep)
        pair: tuple[Tensor, Tensor | None] = self.mlp(x, self.norm2, self.mlp_scale, x_t)
        return pair


def checkpointed(
    block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, x_t: Tensor | None = None, keep: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """block(x, ...) that saves only x for backward, which recomputes the block: the value, not the tangent.

    The tangent is a constant for autograd and none of the block's saved tensors depends on it, so the
    recomputation omits it. Under torch.compile the partitioner discovers this itself.
    """
    tangents = [x_t]

    def run(x: Tensor) -> tuple[Tensor, Tensor | None]:
        pair: tuple[Tensor, Tensor | None] = block(x, cos, sin, tangents.pop() if tangents else None, keep)
        return pair

    if torch.compiler.is_compiling():
        args: tuple[object, ...] = (block, x, cos, sin, x_t, keep)
    else:
        args = run, x
    pair: tuple[Tensor, Tensor | None] = checkpoint(*args, use_reentrant=False, preserve_rng_state=False)
    return pair
