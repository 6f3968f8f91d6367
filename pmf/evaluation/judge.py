"""The Frechet distance of a model's samples to a reference, measured repeatedly during training."""

from dataclasses import astuple
from pathlib import Path

import torch

from pmf.errors import UserError
from pmf.evaluation.counting import count_features, forget_sums
from pmf.evaluation.features import open_space
from pmf.evaluation.sources import ImageSource, Samples, open_images
from pmf.evaluation.statistics import Statistics, read_statistics
from pmf.flow.sampler import Sampler
from pmf.metrics import frechet_of_moments
from pmf.models import PixelMeanFlow
from pmf.ranks import Ranks


class Judge:
    """Compares class-balanced one-step samples, always from the same noise, with a reference.

        judge = Judge("photos", image_shape=(3, 64, 64), features="pixels", folder=Path("judge"), ...)
        distance = judge(model, step)

    reference: statistics (.npz from `pmf evaluate --make-stats`) or images, in a feature space of `pmf
    evaluate`; its features are computed once, in the constructor. images: samples per call. folder: where
    sums are saved while they accumulate, visible to all ranks. Construction and calls are collective.

    Raises UserError if the reference or the feature weights are missing or do not fit.
    """

    def __init__(
        self,
        reference: str,
        *,
        image_shape: tuple[int, int, int],
        features: str,
        weights: Path | None,
        images: int,
        folder: Path,
        device: torch.device,
        batch_size: int,
        ranks: Ranks,
    ) -> None:
        channels, *size = image_shape
        self.images, self.folder, self.batch_size, self.ranks = images, folder, batch_size, ranks
        self.space = open_space(
            features,
            channels=channels,
            size=(size[0], size[1]),
            device=device,
            weights=weights,
            flags="--evaluate-",
        )
        found = read_statistics(Path(reference), self.space) if reference.endswith(".npz") else None
        if found is None:
            source = open_images(reference, channels=channels, size=(size[0], size[1]))
            if len(source) < 2:
                raise UserError(f"{reference} contains one image: a distance needs at least two")
            found = self._count("reference", source)
        self.reference = found

    def __call__(self, model: PixelMeanFlow, step: int) -> float:
        """The distance of this model's samples; step names the file of their sums."""
        classes = list(range(model.config.num_classes))
        samples = Samples(Sampler(model), {"step": step}, classes, self.images)
        if self.ranks.first:  # left by an interruption: a resumed run may arrive with other weights
            forget_sums(self._file(f"step-{step}"))
        found = self._count(f"step-{step}", samples)
        try:
            return self.ranks.from_first(frechet_of_moments(*astuple(found), *astuple(self.reference)))
        except ValueError as error:
            raise UserError(str(error)) from error

    def _count(self, name: str, source: ImageSource) -> Statistics:
        sums = count_features(source, self.space, self.batch_size, self._file(name), self.ranks)
        if self.ranks.first:
            forget_sums(self._file(name))
        mean, covariance = sums.moments.mean_and_covariance()
        return Statistics(mean.cpu(), covariance.cpu())

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
