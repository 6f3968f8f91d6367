"""In-memory datasets."""

from collections.abc import Sequence

import torch

from pmf.data.images import to_float


class MemoryImages:
    """Images in one tensor: uint8 [N, C, H, W], or float32 already in [-1, 1].

    labels [N]: indices into class_names. fingerprint: identifies the images, their order and labels; None if
    that is not known. Raises ValueError if these do not fit together.
    """

    in_memory = True

    def __init__(
        self,
        pixels: torch.Tensor,
        labels: torch.Tensor,
        class_names: list[str],
        fingerprint: str | None = None,
    ) -> None:
        if pixels.dim() != 4 or pixels.dtype not in (torch.uint8, torch.float32):
            raise ValueError(
                "MemoryImages: pixels must be uint8 or float32 [N, C, H, W], "
                f"got {pixels.dtype} {list(pixels.shape)}"
            )
        if labels.shape != pixels.shape[:1]:
            raise ValueError(f"MemoryImages: labels must be [{len(pixels)}], got {list(labels.shape)}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):  # the next: "no label"
            raise ValueError(
                f"MemoryImages: labels must lie between 0 and {len(class_names) - 1}, as there are "
                f"{len(class_names)} class names, got {labels.min().item()} to {labels.max().item()}"
            )
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
