"""Distances between images as networks see them, added to the loss of late samples."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Perceptual"]


class Perceptual(Protocol):
    """What the objective asks of perceptual losses: draws, and distances that it weighs and normalises."""

    max_t: float
    """Only samples with t below this are compared: above it the predicted image is a blur."""

    def draw(
        self, batch: int, image_size: tuple[int, int], generator: torch.Generator | None
    ) -> Tensor | None:
        """`Draws.crop` for images [batch, C, *image_size]: [batch, ...] on the host, or None."""
        ...

    def __call__(self, x_pred: Tensor, x: Tensor, crop: Tensor | None) -> Sequence[tuple[float, Tensor]]:
        """(weight, distances [n]) of each network, for images x_pred = z - t u and x [n, C, H, W].

        crop has the same n rows and lies on the images' device. Gradients flow to x_pred.
        """
        ...
