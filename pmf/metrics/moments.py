"""Mean and covariance of features that come batch by batch, from sums that add up over processes."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Sums of the features x [D] seen so far and of x x^T, in float64.

        mean = sum / n;   covariance = (products - n mean mean^T) / (n - 1)

    The sums of several processes, or of a run's parts, add up to those of the whole. Features of ordinary
    size lose nothing: float64 keeps 16 digits, and 50,000 features of 1 to 100 need about 10.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Count features [B, D], of any floating dtype."""
        if features.ndim != 2 or features.shape[1] != len(self.sum):
            raise ValueError(f"moments: features must be [B, {len(self.sum)}], got {list(features.shape)}")
        features = features.to(self.sum.device, torch.float64)
        self.count += len(features)
        self.sum += features.sum(0)
        self.products.addmm_(features.T, features)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and the samples' covariance [D, D]; ValueError below two samples."""
        if self.count < 2:
            raise ValueError(f"moments: a covariance needs two samples or more, got {int(self.count)}")
        mean = self.sum / self.count
        return mean, (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, to be added up, saved and filled."""
        return {"count": self.count, "sum": self.sum, "products": self.products}
