"""ConvNeXt V2: the pooled features before its classifier.

Tensor names are the authors' (``convnextv2_base_22k_224_ema.pt``); `authors_name` translates those of timm
and transformers.

Source: Woo et al. 2023, "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders".
"""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ConvNeXtV2", "authors_name"]

_EPS = 1e-6


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ResponseNorm(nn.Module):
    """Global response norm of [B, H, W, C]: x + gamma x n / mean(n) + beta, n_c = |x_c| over H and W."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return x + self.gamma * (x * (length / (length.mean(-1, keepdim=True) + _EPS))) + self.beta


class Block(nn.Module):
    """x + pwconv2(grn(gelu(pwconv1(norm(dwconv(x)))))), a 7 x 7 depthwise convolution and a wide MLP."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=_EPS)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.grn = ResponseNorm(4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).movedim(1, -1))
        return x + self.pwconv2(self.grn(F.gelu(self.pwconv1(y)))).movedim(-1, 1)


class ConvNeXtV2(nn.Module):
    """Images [B, 3, H, W], unnormalised, to the features [B, channels[-1]] after the last LayerNorm, float32.

    The defaults are the base size. H and W must be at least 32.
    """

    def __init__(
        self, channels: Sequence[int] = (128, 256, 512, 1024), depths: Sequence[int] = (3, 3, 27, 3)
    ) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, channels[0], 4, stride=4), ChannelNorm(channels[0]))
        steps = zip(channels, channels[1:], strict=False)
        self.downsample_layers = nn.ModuleList(
            [stem, *(nn.Sequential(ChannelNorm(a), nn.Conv2d(a, b, 2, stride=2)) for a, b in steps)]
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width) for _ in range(depth)))
            for width, depth in zip(channels, depths, strict=True)
        )
        self.norm = nn.LayerNorm(channels[-1], eps=_EPS)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        for smaller, blocks in zip(self.downsample_layers, self.stages, strict=True):
            x = blocks(smaller(x))
        return self.norm(x.mean((2, 3)))


_TRANSLATIONS = (
    # timm
    (r"stem\.(\d)\.", r"downsample_layers.0.\1."),
    (r"stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"stages\.(\d)\.blocks\.(\d+)\.", r"stages.\1.\2."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
    (r"\.mlp\.grn\.", ".grn."),
    (r"^head\.norm\.", "norm."),
    # transformers
    (r"^convnextv2\.", ""),
    (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
    (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
    (r"^encoder\.stages\.(\d)\.downsampling_layer\.", r"downsample_layers.\1."),
    (r"^encoder\.stages\.(\d)\.layers\.(\d+)\.", r"stages.\1.\2."),
    (r"\.layernorm\.", ".norm."),
    (r"^layernorm\.", "norm."),
    # both
    (r"\.grn\.weight$", ".grn.gamma"),
    (r"\.grn\.bias$", ".grn.beta"),
)


def authors_name(name: str) -> str:
    """The authors' name for a tensor named by timm or transformers."""
    for pattern, replacement in _TRANSLATIONS:
        name = re.sub(pattern, replacement, name)
    return name
