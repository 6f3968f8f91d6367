"""The Pixel MeanFlow network as one function of its weights, in the paper's order.

Tokens [class | omega | t_min | t_max | time | image]; shared blocks; then the blocks and final layer of one
head. Differentiable in any mode, in the dtype of its inputs. `params` are named as in
`PixelMeanFlow.state_dict()`.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention
from .patch_embed import patch_embed
from .rms_norm import rms_norm
from .rotary_qk_norm import rotary_qk_norm
from .swiglu import swiglu

__all__ = ["network"]

Params = Mapping[str, Tensor]


def network(
    params: Params,
    z: Tensor,
    h: Tensor,
    omega: Tensor,
    t_min: Tensor,
    t_max: Tensor,
    labels: Tensor,
    *,
    num_heads: int,
    head: str,
) -> Tensor:
    """The image [B, C, H, W] that head "u" or "v" predicts from z [B, C, H, W]; each condition is [B]."""
    prefix = torch.cat(
        [
            params["condition.class_tokens"]
            + params["condition.label_embedder.embedding.weight"][labels][:, None],
            _scalar_tokens(params, "omega", 1 - 1 / omega),
            _scalar_tokens(params, "t_min", t_min),
            _scalar_tokens(params, "t_max", t_max),
            _scalar_tokens(params, "time", h),
        ],
        1,
    )
    patch = {
        name: params[f"patch_embedding.{name}"]
        for name in ("weight_down", "bias_down", "weight_up", "bias_up")
    }
    x = patch_embed(z, **patch, position=params["position"][0], prefix=prefix)
    patch_size = patch["weight_down"].shape[-1]
    grid = z.shape[-2] // patch_size, z.shape[-1] // patch_size  # rows and columns of tokens
    cos, sin = _rotary(grid, x.shape[-1] // num_heads, x)
    for stack in ("shared_blocks", f"{head}_head"):
        for i in range(_depth(params, stack)):
            x = _block(_below(params, f"{stack}.{i}"), x, cos, sin, num_heads)

    final = _below(params, f"{head}_final")
    x = rms_norm(x[:, prefix.shape[1] :], final["norm.weight"])
    x = F.linear(x, final["linear.weight"], final["linear.bias"])
    x = x.unflatten(-1, (patch_size, patch_size, -1)).unflatten(1, grid)  # [B, row, column, p, p, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _scalar_tokens(params: Params, name: str, value: Tensor) -> Tensor:
    """Learned tokens of a group plus Linear(SiLU(Linear(sinusoid))) of its scalar: [B, n, D]."""
    frequency = torch.exp(-math.log(1e4) * torch.arange(128, dtype=value.dtype, device=value.device) / 128)
    angle = value[:, None] * frequency
    y = torch.cat((angle.cos(), angle.sin()), -1)
    mlp = _below(params, f"condition.{name}_embedder")
    y = F.silu(F.linear(y, mlp["linear1.weight"], mlp["linear1.bias"]))
    y = F.linear(y, mlp["linear2.weight"], mlp["linear2.bias"])
    return params[f"condition.{name}_tokens"] + y[:, None]


def _block(w: Params, x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    y = rms_norm(x, w["norm1.weight"])
    q, k, v = (
        F.linear(y, w[f"attn.{name}_proj.weight"]).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for name in "qkv"
    )
    q, k = rotary_qk_norm(q, k, w["attn.q_norm.weight"], w["attn.k_norm.weight"], cos, sin)
    y = attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + w["attn_scale"] * F.linear(y, w["attn.out_proj.weight"])
    y = rms_norm(x, w["norm2.weight"])
    y = swiglu(F.linear(y, w["mlp.w1.weight"]), F.linear(y, w["mlp.w3.weight"]))
    return x + w["mlp_scale"] * F.linear(y, w["mlp.w2.weight"])


def _rotary(grid: tuple[int, int], head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [rows columns, head_dim / 2]: half the pairs turn with the row, half with the column."""
    pairs = head_dim // 4
    frequency = 1e4 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    token = torch.arange(grid[0] * grid[1])
    row, column = token // grid[1], token % grid[1]
    angle = torch.cat((row[:, None] * frequency, column[:, None] * frequency), 1)
    return angle.cos().to(like), angle.sin().to(like)


def _below(params: Params, prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: p for name, p in params.items() if name.startswith(prefix + ".")}


def _depth(params: Params, stack: str) -> int:
    return len({name.split(".")[1] for name in params if name.startswith(stack + ".")})
