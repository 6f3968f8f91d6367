"""Small networks as third parties write them, without anything from this library.

Each entry of NETWORKS creates a module, its inputs and the constants of the call; tangents are checked
against `jvp_math`, torch.func.jvp through PyTorch's math attention.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as imported_before


class Problem(NamedTuple):
    network: nn.Module
    primals: tuple[Tensor, ...]
    constants: dict[str, Any] = {}

    def tangents(self) -> tuple[Tensor, ...]:
        return tuple(torch.randn_like(x) for x in self.primals)


def jvp_math(network: Callable[..., Any], primals: Any, tangents: Any, **constants: Any) -> Any:
    torch.backends.mha.set_fastpath_enabled(False)  # it has no forward mode
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(lambda *x: network(*x, **constants), tuple(primals), tuple(tangents))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, attention: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attention = self.attention or F.scaled_dot_product_attention
        return self.out(attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, attention: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads, attention)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, width: int = 16, depth: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, None if i % 2 else imported_before) for i in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class DiT(nn.Module):
    """Blocks with adaLN: norms without weights, shifted, scaled and gated by the embedded time."""

    def __init__(self, width: int = 16, depth: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2 * depth)
        )
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
            )
            for _ in range(depth)
        )
        self.modulations = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)) for _ in range(depth)
        )

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        angles = torch.cat((t[:, None], r[:, None]), 1)[..., None] * torch.arange(1, 3, dtype=x.dtype)
        c = self.time(torch.cat((angles.cos(), angles.sin()), 2).flatten(1))
        for i, modulation in enumerate(self.modulations):
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation(c)[:, None].chunk(6, -1)
            y = self.norms[2 * i](x) * (1 + scale1) + shift1
            x = x + gate1 * self.attention[i](y)
            y = self.norms[2 * i + 1](x) * (1 + scale2) + shift2
            x = x + gate2 * self.mlps[i](y)
        return x


class UNet1d(nn.Module):
    """Convolutions, group norms, strides, nearest and transposed upsampling, skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            (nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 8, 3, 2, 1), nn.Conv1d(8, 8, 3, 2, 1))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(2, 8) for _ in range(3))
        self.up1, self.up2 = nn.ConvTranspose1d(8, 8, 4, 2, 1), nn.Conv1d(16, 8, 3, padding=1)
        self.out = nn.Conv1d(16, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for conv, norm in zip(self.down, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
            seen.append(x)
        x = torch.cat((self.up1(x), seen[1]), 1)
        x = F.interpolate(F.leaky_relu(self.up2(x)), scale_factor=2)
        return self.out(torch.cat((x, F.avg_pool1d(seen[0], 3, 1, 1)), 1))


class Points(nn.Module):
    """An MLP that uses every activation."""

    activations: tuple[Any, ...] = (
        torch.tanh,
        F.softplus,
        torch.sin,
        F.elu,
        F.mish,
        torch.sigmoid,
        F.hardswish,
        torch.exp,
    )

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4 if i == 0 else 12, 12) for i in range(len(self.activations)))
        self.last = nn.Linear(12, 2)

    def forward(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        x = torch.cat((z, t[:, None], r[:, None]), 1)
        for layer, activation in zip(self.layers, self.activations, strict=True):
            x = activation(layer(x))
        return self.last(F.normalize(x, dim=-1))


def vit(dtype: torch.dtype, depth: int = 2) -> Problem:
    return Problem(ViT(depth=depth).to(dtype), (torch.randn(3, 3, 8, 8, dtype=dtype),))


def dit(dtype: torch.dtype, depth: int = 2) -> Problem:
    return Problem(DiT(depth=depth).to(dtype), (torch.randn(3, 6, 16, dtype=dtype), *times(dtype)))


def encoder(dtype: torch.dtype, training: bool = True, depth: int = 2) -> Problem:
    """nn.TransformerEncoder, the last keys of the second sample being padding."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    network = nn.TransformerEncoder(layer, depth).to(dtype).train(training)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    return Problem(network, (torch.randn(2, 7, 16, dtype=dtype),), {"src_key_padding_mask": padding})


def transformer(dtype: torch.dtype) -> Problem:
    network = nn.Transformer(
        16, 2, 1, 1, 24, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    primals = torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, 6, 16, dtype=dtype)
    return Problem(
        network.to(dtype),
        primals,
        {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(6, dtype=dtype)},
    )


def times(dtype: torch.dtype, batch: int = 3) -> tuple[Tensor, Tensor]:
    t = torch.rand(batch, dtype=dtype)
    return t, t * torch.rand(batch, dtype=dtype)


NETWORKS: dict[str, Callable[[torch.dtype], Problem]] = {
    "ViT": vit,
    "DiT": dit,
    "encoder": encoder,
    "encoder, eval": lambda dtype: encoder(dtype, training=False),
    "transformer": transformer,
    "U-Net": lambda dtype: Problem(UNet1d().to(dtype), (torch.randn(2, 2, 16, dtype=dtype),)),
    "points": lambda dtype: Problem(Points().to(dtype), (torch.randn(3, 2, dtype=dtype), *times(dtype))),
}
