"""Perceptual losses for training: distances of frozen networks on paired random crops."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pmf.sizes import Size

from .crop import crop_and_resize, draw_crops
from .networks import find_lite0, load_convnext, load_lpips
from .weights import WeightFiles

__all__ = ["CHOICES", "CroppedDistances", "FeatureDistance", "build"]

LPIPS_NETWORKS = {
    "lpips": "vgg",
    "both": "vgg",
    "stlpips": "stlpips-alex",
    "stlpips-vgg": "stlpips-vgg",
    "offline": "stlpips-alex",
    "offline-vgg": "stlpips-vgg",
}
FEATURE_NETWORKS: dict[str, Callable[[WeightFiles], nn.Module]] = {
    "convnext": load_convnext,
    "both": load_convnext,
    "lite0": find_lite0,
    "offline": find_lite0,
    "offline-vgg": find_lite0,
}
CHOICES = ("none", "lpips", "convnext", "both", "stlpips", "stlpips-vgg", "lite0", "offline", "offline-vgg")
"""both: LPIPS-VGG and ConvNeXt, as in the paper. The last five need only PyPI packages."""


class FeatureDistance(nn.Module):
    """Sum of squared differences of pooled features: images a, b [B, 3, H, W] to [B]."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.features(a).float() - self.features(b).float()).square().sum(1)


class CroppedDistances:
    """`pmf.flow.Perceptual`: weighted distances between two images after a random crop per sample.

    networks are (weight, distance) pairs with distance(a, b) -> [B] for images [B, 3, size, size] in [-1, 1];
    every crop is resized to size (224, on which the networks were trained, as in the paper). Greyscale images
    are repeated over three channels. The networks are frozen, with float32 weights; compute_dtype is that of
    their convolutions and products: float32 or, by autocast, bfloat16.
    """

    def __init__(
        self,
        networks: Sequence[tuple[float, nn.Module]],
        max_t: float = 0.8,
        size: int = 224,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        if compute_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"perceptual: compute_dtype must be float32 or bfloat16, got {compute_dtype}")
        self.networks = [(weight, distance.eval().requires_grad_(False)) for weight, distance in networks]
        self.max_t, self.size, self.compute_dtype = max_t, size, compute_dtype

    def draw(self, batch: int, image_size: Size, generator: torch.Generator | None) -> Tensor:
        """Draw boxes (top, left, height, width), int64 [batch, 4] on the host."""
        return draw_crops(batch, image_size, generator)

    def __call__(self, x_pred: Tensor, x: Tensor, crop: Tensor | None) -> list[tuple[float, Tensor]]:
        """(weight, distances [n]) of each network; gradients flow to x_pred only."""
        if crop is None:
            raise ValueError("perceptual: draws.crop is missing: take the draws from Objective.draw")
        if x.shape[1] not in (1, 3):
            raise ValueError(f"perceptual: images must have 1 or 3 channels, got {x.shape[1]}")
        low = self.compute_dtype == torch.bfloat16
        a, b = (
            # Channels last is the fastest layout for these networks (1.4 to 1.7 times on a CPU core).
            crop_and_resize(images, crop, self.size)
            .expand(-1, 3, -1, -1)
            .contiguous(memory_format=torch.channels_last)
            for images in (x_pred, x.detach())
        )
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            return [(weight, distance.to(x.device)(a, b).to(x.dtype)) for weight, distance in self.networks]


def build(
    name: str,
    *,
    lpips_lambda: float = 0.4,
    convnext_lambda: float = 0.1,
    max_t: float = 0.8,
    size: int = 224,
    weights: Sequence[str | Path] = (),
    compute_dtype: torch.dtype = torch.float32,
) -> CroppedDistances | None:
    """Build the named losses (one of CHOICES), or None; UserError if weights are missing.

    Every LPIPS has weight lpips_lambda, squared feature differences have convnext_lambda.
    """
    if name not in CHOICES:
        raise ValueError(f"perceptual: the loss must be one of {', '.join(CHOICES)}, got {name!r}")
    files = WeightFiles([Path(path) for path in weights], otherwise=" (or train with --perceptual none)")
    networks: list[tuple[float, nn.Module]] = []
    with torch.random.fork_rng(devices=[]):  # networks draw random weights before loading
        if name in LPIPS_NETWORKS:
            networks.append((lpips_lambda, load_lpips(LPIPS_NETWORKS[name], files)))
        if name in FEATURE_NETWORKS:
            networks.append((convnext_lambda, FeatureDistance(FEATURE_NETWORKS[name](files))))
    files.check_used()
    return CroppedDistances(networks, max_t, size, compute_dtype) if networks else None
