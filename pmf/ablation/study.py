"""Run every variant with every seed and record what is finished."""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pmf import checkpoint, flow
from pmf.ablation.judge import SMALLEST, Judge, Reference, Split, train_judge
from pmf.ablation.variants import Variant, check_names
from pmf.atomic import write_file
from pmf.data import load_dataset
from pmf.devices import find_device
from pmf.errors import UserError
from pmf.evaluation import SPACES, open_space
from pmf.models import PixelMeanFlow
from pmf.pictures import image_grid, save_png
from pmf.training import TrainConfig, refuse_unread, train
from pmf.training.building import build_objective, model_config

__all__ = ["CLASSIFIER", "Study"]

CLASSIFIER = "classifier"
"""The feature space of the classifier that a study trains."""

_SAMPLES = 5000  # per run, if there are at least twice as many real images
_JUDGE_STEPS = 1000
_DRAWN_AT_A_TIME = 500
_GRID = 10  # classes, and samples per class, in a variant's picture


class Study:
    """Variants of a configuration, with several seeds, in one folder.

    out/runs/<variant>-seed<k>.json contains the settings and scores of each finished run; a study started
    again with the same settings skips them. Data, judge, labels and noise of the samples, and number of steps
    are the same for all variants.

    features: the space of the Frechet distance, that of the classifier or one of `pmf evaluate`.

    Raises UserError before anything runs if a variant is invalid, two share a name, there are fewer images
    than samples, the feature space lacks its weights, or a finished run had other settings.
    """

    def __init__(
        self,
        base: TrainConfig,
        variants: Sequence[Variant],
        seeds: Sequence[int],
        out: Path,
        *,
        samples: int | None = None,
        judge_steps: int | None = None,
        features: str = CLASSIFIER,
    ) -> None:
        check_names(variants)
        if base.run.steps is None or base.run.minutes is not None:
            raise UserError("variants are compared at equal steps: give --steps, not --minutes")
        self.base, self.variants, self.seeds, self.out = base, list(variants), list(seeds), out
        self.judge_steps = _JUDGE_STEPS if judge_steps is None else judge_steps
        device = find_device(base.run.device)
        self.configs = {variant.name: self._config_of(variant) for variant in variants}
        model = model_config(base, num_classes=1)
        if min(model.image_shape[1:]) < SMALLEST:
            raise UserError(
                f"the judge of a study needs images of {SMALLEST} pixels or more, got {model.image_size}: "
                "give a larger --image-size"
            )
        self.dataset = load_dataset(base.data.data, model.image_size, model.channels)
        if features == CLASSIFIER and len(self.dataset.class_names) < 2:
            raise UserError(
                f"the images of {base.data.data} have no classes that a classifier could learn: give "
                f"--features, one of {', '.join(SPACES)}"
            )
        self.samples = min(_SAMPLES, len(self.dataset) // 2) if samples is None else samples
        if not 2 <= self.samples <= len(self.dataset):
            raise UserError(
                f"--samples must lie between 2 and the {len(self.dataset)} images, got {self.samples}"
            )
        if self.judge_steps < 1:
            raise UserError(f"--judge-steps must be 1 or more, got {judge_steps}")
        self.split = Split.of(self.dataset, self.samples)
        self.features = features
        self.space = None
        if features != CLASSIFIER:
            height, width = model.image_shape[1:]
            self.space = open_space(features, channels=model.channels, size=(height, width), device=device)
        self.finished: dict[tuple[str, int], dict[str, Any]] = {}
        for variant, seed in self.runs():
            if self._file(variant, seed).is_file():
                self.finished[variant.name, seed] = self._read(variant, seed)

    def runs(self) -> Iterator[tuple[Variant, int]]:
        """Seed by seed, so that an interrupted study has compared all variants on fewer seeds."""
        for seed in self.seeds:
            for variant in self.variants:
                yield variant, seed

    def prepare(self) -> Reference:
        """The judge, trained or loaded from the folder, with the reference for samples."""
        path = self.out / "judge.safetensors"
        split = self.split
        if path.is_file():
            tensors, about = checkpoint.read_tensors(path)
            if about != self._judge_of():
                raise UserError(
                    f"{path} used other --judge-steps, --samples or images: give another --out, or remove "
                    f"{self.out}"
                )
            judge = Judge.like(self.dataset)
            checkpoint.assign_weights(judge, tensors, path)
        else:
            judge = train_judge(self.dataset, split, self.judge_steps)
            write_file(path, checkpoint.tensors_bytes(judge.state_dict(), self._judge_of()))
        return Reference.of(judge.eval().requires_grad_(False), self.dataset, split, self.space)

    def run(self, variant: Variant, seed: int, reference: Reference) -> dict[str, Any] | None:
        """Train, sample, score and save the result; None if Ctrl-C stopped the training.

        Raises UserError naming the variant if it diverges.
        """
        config = self.configs[variant.name].with_settings(seed=seed)
        begin = time.perf_counter()
        try:
            result = train(config, dataset=self.dataset)
            if result.interrupted:
                return None
            trained = time.perf_counter()
            images = self._draw(result.model, reference.labels, seed)
            figures = reference.measure(images)
        except (UserError, ValueError) as error:
            raise UserError(
                f"variant {variant.name!r}, seed {seed}: {error}; --only runs the others"
            ) from error
        row = {
            "variant": variant.name,
            "seed": seed,
            **figures,
            "steps": result.step,
            "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
            "training_seconds": round(trained - begin, 2),
            "seconds": round(time.perf_counter() - begin, 2),
        }
        if seed == self.seeds[0]:
            self._save_picture(variant, images, reference.labels)
        content = {"result": row, "measured_by": self._measure(), "settings": config.to_json()}
        write_file(self._file(variant, seed), (json.dumps(content, indent=2) + "\n").encode())
        self.finished[variant.name, seed] = row
        return row

    def _config_of(self, variant: Variant) -> TrainConfig:
        """The variant's settings, checked by building its network and objective configuration."""
        try:
            config = self.base.with_settings(**variant.settings)
            refuse_unread(config, variant.settings)
            build_objective(config, model_config(config, num_classes=2).noise_scale)
        except (UserError, ValueError) as error:
            raise UserError(f"variant {variant.name!r}: {error}") from error
        return config

    def _draw(self, model: PixelMeanFlow, labels: torch.Tensor, seed: int) -> torch.Tensor:
        """One-step samples [N, C, H, W] in [-1, 1] on the host."""
        sampler, generator = flow.Sampler(model), torch.Generator("cpu").manual_seed(seed)
        parts = [sampler(part, generator=generator).cpu() for part in labels.split(_DRAWN_AT_A_TIME)]
        return torch.cat(parts).clamp(-1, 1)

    def _save_picture(self, variant: Variant, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Save the first samples of the first classes, a row per class."""
        rows = [(labels == label).nonzero().flatten()[:_GRID] for label in labels.unique()[:_GRID]]
        full = [row for row in rows if len(row) == min(_GRID, max(map(len, rows)))]
        path = self.out / "samples" / f"{variant.stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(image_grid(images[torch.cat(full)], len(full[0])), path)

    def _file(self, variant: Variant, seed: int) -> Path:
        return self.out / "runs" / f"{variant.stem}-seed{seed}.json"

    def _judge_of(self) -> dict[str, Any]:
        """What determines the judge's weights, as recorded in its file."""
        fingerprint = getattr(self.dataset, "fingerprint", None)
        images = {"data": self.base.data.data, "images": len(self.dataset), "fingerprint": fingerprint}
        shape = list(self.dataset.get([0])[0].shape[1:])
        return {"steps": self.judge_steps, **images, "shape": shape, "trained_on": len(self.split.seen)}

    def _measure(self) -> dict[str, Any]:
        return {"samples": self.samples, "features": self.features, "judge": self._judge_of()}

    def _read(self, variant: Variant, seed: int) -> dict[str, Any]:
        """The result of a finished run; UserError if its file is damaged or the settings differ."""
        path = self._file(variant, seed)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            row: dict[str, Any] = content["result"]
            same = content["measured_by"] == self._measure()
            settings = TrainConfig.from_json(content["settings"])
        except (OSError, ValueError, KeyError, TypeError, UserError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it to repeat the run") from error
        if not same or settings != self.configs[variant.name].with_settings(seed=seed):
            raise UserError(f"{path} belongs to a run with other settings: give another --out, or remove it")
        return row
