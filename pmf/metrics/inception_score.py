"""Inception Score from class logits, batch by batch, with sums that can be added over processes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_SHUFFLE_SEED = 2020  # torch-fidelity's, for identical splits


class InceptionScore:
    """exp(mean_x KL(p(y|x) || p(y))) on each of `splits` parts of the images; mean and deviation.

    With p = p(y|x) and q = mean_x p, the mean KL is mean_x sum_y p log p - sum_y q log q: two sums per part.
    Images are assigned to parts by a fixed permutation, the one torch-fidelity draws, so that images sorted
    by class still give balanced parts.

    Source: Salimans et al. 2016, "Improved Techniques for Training GANs"; ten parts by convention.
    """

    def __init__(
        self, images: int, classes: int, splits: int = 10, device: torch.device | str = "cpu"
    ) -> None:
        if not 1 <= splits <= images:
            raise ValueError(
                f"inception score: splits must lie between 1 and the {images} images, got {splits}"
            )
        bounds = np.arange(splits + 1) * images // splits
        part = np.empty(images, dtype=np.int64)
        order = np.random.RandomState(_SHUFFLE_SEED).permutation(images)
        part[order] = np.searchsorted(bounds, np.arange(images), side="right") - 1
        self._part = torch.from_numpy(part)
        self.count = torch.zeros(splits, dtype=torch.float64, device=device)
        self.negentropy = torch.zeros(splits, dtype=torch.float64, device=device)
        self.probability = torch.zeros(splits, classes, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, indices: Tensor) -> None:
        """Add the logits [B, classes] of the images with these indices [B]."""
        logits = logits.to(self.count.device, torch.float64)
        part = self._part[indices.cpu()].to(logits.device)
        log_p = logits.log_softmax(1)
        p = log_p.exp()
        self.count.index_add_(0, part, torch.ones_like(p[:, 0]))
        self.negentropy.index_add_(0, part, (p * log_p).sum(1))
        self.probability.index_add_(0, part, p)

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation over the parts; ValueError unless every image was counted once."""
        if not torch.equal(self.count.cpu(), self._part.bincount(minlength=len(self.count)).double()):
            raise ValueError("inception score: some images were not counted, or more than once")
        q = self.probability / self.count[:, None]
        scores = (self.negentropy / self.count - torch.xlogy(q, q).sum(1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, for adding, saving and loading."""
        return {"count": self.count, "negentropy": self.negentropy, "probability": self.probability}
