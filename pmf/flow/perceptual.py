"""The interface of perceptual losses, which apply to samples at small t."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Perceptual"]


@runtime_checkable
class Perceptual(Protocol):
    """Perceptual distances for the objective, which weights and normalises them, and their random draws."""

    max_t: float
    """Only samples with t below this are compared: above it the predicted image is blurred."""

    def draw(
        self, batch: int, image_size: tuple[int, int], generator: torch.Generator | None
    ) -> Tensor | None:
        """Draw `Draws.crop` for images [batch, C, *image_size]: [batch, ...] on the host, or None."""
        ...

    def __call__(self, x_pred: Tensor, x: Tensor, crop: Tensor | None) -> Sequence[tuple[float, Tensor]]:
        """(weight, distances [n]) of each network, for images x_pred = z - t u and x [n, C, H, W].

        crop has the same n rows and is on the images' device. Gradients flow to x_pred.
        """
        ...
