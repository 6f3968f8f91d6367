"""Images to tokens through a bottleneck (JiT; Li and He, 2025), and the tangent.

    tokens = W_up (W_down patches + b_down) + b_up + position      t tokens = W_up W_down t patches

A patch is p x p pixels of all channels. The map is affine: the tangent is the same map without the biases.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["patch_embed", "patch_embed_jvp"]


def patch_embed(
    images: Tensor,
    weight_down: Tensor,
    bias_down: Tensor | None,
    weight_up: Tensor,
    bias_up: Tensor | None,
    position: Tensor | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    """tokens [B, P + N, D] of images [B, C, H, W].

    weight_down [R, C, p, p], weight_up [D, R]; prefix [B, P, D] is prepended; position [n, D] is added to the
    last n tokens: n = N for the image tokens only, P + N for all.
    """
    patches = F.conv2d(images, weight_down, bias_down, stride=weight_down.shape[-1])
    tokens = F.linear(patches.flatten(2).mT, weight_up, bias_up)
    if prefix is not None:
        tokens = torch.cat((prefix, tokens), 1)
    if position is not None:
        tokens = tokens + F.pad(position, (0, 0, tokens.shape[1] - position.shape[0], 0))
    return tokens


def patch_embed_jvp(
    images: Tensor,
    weight_down: Tensor,
    bias_down: Tensor | None,
    weight_up: Tensor,
    bias_up: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    images_t: Tensor | None,
    prefix_t: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(tokens, t tokens): patch_embed and its derivative along (images_t, prefix_t); None is zero."""
    images_t = torch.zeros_like(images) if images_t is None else images_t
    if prefix is not None and prefix_t is None:
        prefix_t = torch.zeros_like(prefix)
    tokens = patch_embed(images, weight_down, bias_down, weight_up, bias_up, position, prefix)
    tokens_t = patch_embed(images_t, weight_down, None, weight_up, None, None, prefix_t)
    return tokens, tokens_t
