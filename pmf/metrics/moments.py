"""Mean and covariance of features, batch by batch, from sums that can be added over processes."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Running sums of features x [D] and of x x^T, in float64.

        mean = sum / n;   covariance = (products - n mean mean^T) / (n - 1)

    Sums from several processes, or parts of a run, can be added. Precision is ample for ordinary features:
    float64 has 16 digits, and 50,000 features between 1 and 100 need about 10.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Add features [B, D] of any floating dtype."""
        if features.ndim != 2 or features.shape[1] != len(self.sum):
            raise ValueError(f"moments: features must be [B, {len(self.sum)}], got {list(features.shape)}")
        features = features.to(self.sum.device, torch.float64)
        self.count += len(features)
        self.sum += features.sum(0)
        self.products.addmm_(features.T, features)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and sample covariance [D, D]; ValueError with fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"moments: a covariance needs two samples or more, got {int(self.count)}")
        mean = self.sum / self.count
        return mean, (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, for adding, saving and loading."""
        return {"count": self.count, "sum": self.sum, "products": self.products}
