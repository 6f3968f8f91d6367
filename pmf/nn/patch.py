"""Images to tokens through a bottleneck."""

import torch
from torch import Tensor, nn

from . import tangent

__all__ = ["PatchEmbedding"]


class PatchEmbedding(nn.Module):
    """tokens = W_up (W_down patch + b_down) + b_up after the prefix, plus position; images [B, C, H, W].

    The weights have the shapes that `pmf.ops.patch_embed` takes: weight_down [R, C, p, p], weight_up [D, R].
    """

    def __init__(self, channels: int, patch_size: int, bottleneck: int, hidden_size: int) -> None:
        super().__init__()
        self.weight_down = nn.Parameter(torch.empty(bottleneck, channels, patch_size, patch_size))
        self.bias_down = nn.Parameter(torch.zeros(bottleneck))
        self.weight_up = nn.Parameter(torch.empty(hidden_size, bottleneck))
        self.bias_up = nn.Parameter(torch.zeros(hidden_size))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Glorot and Bengio's (2010) uniform initialisation, treating each layer as a matrix; biases zero."""
        for weight in (self.weight_down, self.weight_up):
            fan_out, fan_in = weight.flatten(1).shape
            bound = (6 / (fan_in + fan_out)) ** 0.5
            weight.uniform_(-bound, bound, generator=generator)
        self.bias_down.zero_()
        self.bias_up.zero_()

    def forward(
        self,
        images: Tensor,
        position: Tensor,
        prefix: Tensor,
        images_t: Tensor | None = None,
        prefix_t: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, C, H, W] -> [B, P + N, D]; position [1, P + N, D], prefix [B, P, D]; tangents [n, ...]."""
        weights = self.weight_down, self.bias_down, self.weight_up, self.bias_up
        return tangent.patch_embed(images, *weights, position[0], prefix, images_t, prefix_t)
