"""In-memory datasets."""

from collections.abc import Sequence

import torch

from pmf.data.images import to_float


class MemoryImages:
    """Images in one tensor: uint8 [N, C, H, W], or float32 already in [-1, 1].

    fingerprint: identifies the images, their order and labels; None if that is not known.
    """

    in_memory = True

    def __init__(
        self,
        pixels: torch.Tensor,
        labels: torch.Tensor,
        class_names: list[str],
        fingerprint: str | None = None,
    ) -> None:
        self.pixels, self.labels, self.class_names = pixels, labels.to(torch.int64), class_names
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.as_tensor(indices, device=self.pixels.device)
        return self.pixels[rows], self.labels[rows]

    def get(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, labels = self.read(indices)
        return to_float(pixels), labels
