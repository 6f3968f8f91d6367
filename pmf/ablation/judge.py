"""A small classifier of the real images, whose features and predictions score the samples.

It needs no downloaded weights and works for every labelled dataset. A Frechet distance in its features is not
FID and is comparable only within one study. Where a study compares perceptual losses or has few images, a
published network (`pmf.evaluation.open_space`) supplies the features and the classifier only the predictions.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmf.data import ImageDataset
from pmf.defaults import whole_numbers
from pmf.evaluation import FeatureSpace
from pmf.metrics import frechet_distance
from pmf.pictures import to_uint8
from pmf.sizes import Size, height_and_width

__all__ = ["SMALLEST", "Judge", "Reference", "Split", "train_judge"]

SMALLEST = 8
"""Smallest image side in pixels that can be judged."""
_WIDTH = 64  # feature dimension
_BATCH, _RATE = 128, 2e-3
_CHUNK = 1000  # images per batch when judging
_SPACE_CHUNK = 50  # by a large network
_PIXELS = 1024  # maximum dimension of the pixel comparison; larger images are averaged down


class Judge(nn.Module):
    """Three convolutions, 64 features, a linear classifier: for images [B, C, H, W] of at least 8 pixels."""

    def __init__(self, channels: int, image_size: Size, num_classes: int) -> None:
        super().__init__()
        height, width = height_and_width(image_size)
        first = 2 if min(height, width) >= 16 else 1
        pooled = min(4, height // 4), min(4, width // 4)
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, 32, 3, first, 1),
            nn.GELU(),
            nn.Conv2d(32, _WIDTH, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(_WIDTH, _WIDTH, 3, 2, 1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(pooled),
            nn.Flatten(),
            nn.Linear(_WIDTH * pooled[0] * pooled[1], _WIDTH),
            nn.GELU(),
        )
        self.classify = nn.Linear(_WIDTH, num_classes)

    @classmethod
    def like(cls, dataset: ImageDataset, seed: int = 0) -> "Judge":
        """An untrained judge for the images and classes of a dataset."""
        image = dataset.get([0])[0][0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(image.shape[0], height_and_width(image.shape[1:]), len(dataset.class_names))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.trunk(images))
        return logits

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Features [N, 64] of images [N, C, H, W]."""
        return torch.cat([self.trunk(part) for part in images.split(_CHUNK)])

    @torch.inference_mode()
    def recognised(self, features: Tensor, labels: Tensor) -> float:
        """The fraction of features classified as their label."""
        return float((self.classify(features).argmax(1) == labels).double().mean())


class Split(NamedTuple):
    """Indices into a dataset, in an order drawn once."""

    seen: list[int]
    """The judge's training images."""
    unseen: list[int]
    """Held out from them to measure the judge's accuracy: a tenth, at most 5000, and all of `others`."""
    real: list[int]
    """The reference images for samples."""
    others: list[int]
    """An equal number of unseen images, if available: the score of perfect samples."""

    @classmethod
    def of(cls, dataset: ImageDataset, samples: int, seed: int = 0) -> "Split":
        order = torch.randperm(
            len(dataset), generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
        ).tolist()
        num_others = samples if 2 * samples <= len(order) else 0
        held_out = max(1, min(len(order) // 10, 5000), num_others)
        unseen = order[-held_out:]
        return cls(order[:-held_out], unseen, order[:samples], unseen[:num_others])


@dataclass(frozen=True)
class Reference:
    """A judge, and its view of real images with their labels."""

    judge: Judge
    labels: Tensor
    features: Tensor
    pixels: Tensor
    accuracy: float
    """Of the judge, on held-out real images."""
    real: dict[str, float]
    """`measure` of other real images, which the judge has not seen; empty if there are none."""
    space: FeatureSpace | None = None
    """The features are its, or else the judge's."""

    @classmethod
    def of(
        cls, judge: Judge, dataset: ImageDataset, split: Split, space: FeatureSpace | None = None
    ) -> "Reference":
        images, labels = dataset.get(split.unseen)
        accuracy = judge.recognised(judge.features(images), labels)
        images, labels = dataset.get(split.real)
        features = judge.features(images) if space is None else _features_in(space, images)
        reference = cls(judge, labels, features, as_pixels(images), accuracy, {}, space)
        if split.others:
            reference.real.update(reference.measure(*dataset.get(split.others)))
        return reference

    def measure(self, images: Tensor, labels: Tensor | None = None) -> dict[str, float]:
        """Scores of samples [N, C, H, W] in [-1, 1] with these labels (default: those of the real images)."""
        own = self.judge.features(images)
        features = own if self.space is None else _features_in(self.space, images)
        return {
            "frechet": frechet_distance(features, self.features),
            "frechet_pixels": frechet_distance(as_pixels(images), self.pixels),
            "recognised": self.judge.recognised(own, self.labels if labels is None else labels),
        }


def _features_in(space: FeatureSpace, images: Tensor) -> Tensor:
    return torch.cat([space(to_uint8(part))[0].cpu() for part in images.split(_SPACE_CHUNK)])


def train_judge(dataset: ImageDataset, split: Split, steps: int, seed: int = 0) -> Judge:
    """Train a judge for `steps` batches of 128, at a constant rate that decays to 0 over the second half."""
    judge, generator = Judge.like(dataset, seed), torch.Generator("cpu").manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), _RATE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1.0, 2 * (steps - step) / steps)
        chosen = whole_numbers(len(split.seen), _BATCH, generator=generator).tolist()
        images, labels = dataset.get([split.seen[row] for row in chosen])
        optimizer.zero_grad()
        F.cross_entropy(judge(images), labels).backward()
        optimizer.step()
    return judge


def as_pixels(images: Tensor) -> Tensor:
    """Images [N, C, H, W] as vectors [N, D], averaged down by integer factors until D is at most 1024."""
    factor = 1
    while math.prod((images.shape[1], *(side // factor for side in images.shape[2:]))) > _PIXELS:
        factor += 1
    return F.avg_pool2d(images, factor).flatten(1)
