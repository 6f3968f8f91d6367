"""Quality of one-step digits after ten minutes of training on this machine.

For each seed: train the ``digits`` preset for ``--minutes``, sample one image per real image with its label
in one step, clip it to [-1, 1], and compare the two sets of 1797 images as 64 pixels in [-1, 1]:

- accuracy: the fraction classified as their label by an SVM trained on the real digits (its own accuracy on
  held-out digits, five folds, is printed first; below 0.98 this score means little);
- Frechet distance between the pixel Gaussians; recall and coverage with k = 3 neighbours (``pmf.metrics``).

For reference, two halves of the real set are scored too. The preset's omega and interval are used throughout;
the network's output is not post-processed. The last line is the worst seed's: ``accuracy=A frechet=F recall=R
coverage=C``.

    python benchmarks/digits_quality.py [--seeds 3] [--minutes 10] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import SVC

import pmf
from pmf.metrics import coverage, frechet_distance, recall
from pmf.training import get_preset, train

FIGURES = ("accuracy", "frechet", "recall", "coverage")


def real_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1797 digits as [N, 64] pixels in [-1, 1], and their labels."""
    digits = load_digits()
    return torch.tensor(digits.data / 8 - 1, dtype=torch.float32), torch.tensor(digits.target)


def classifier() -> SVC:
    """RBF support vectors on pixels in [-1, 1]: the classical model for this dataset."""
    return SVC(C=10, gamma="scale")


def spread(real: torch.Tensor, samples: torch.Tensor) -> dict[str, float]:
    """Frechet distance, recall and coverage of one set of images against another."""
    return {
        "frechet": frechet_distance(samples, real),
        "recall": recall(real, samples),
        "coverage": coverage(real, samples),
    }


def real_halves(pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """The same scores between two class-balanced halves of the data: what perfect samples would get."""
    first, second = next(StratifiedKFold(2, shuffle=True, random_state=0).split(pixels, labels))
    return spread(pixels[first], pixels[second])


def train_and_score(
    seed: int, minutes: float, pixels: torch.Tensor, labels: torch.Tensor, svm: SVC
) -> dict[str, float]:
    config = get_preset("digits", minutes=minutes, seed=seed)
    low, high = config.sampling.sample_interval or (0.0, 1.0)
    start = time.perf_counter()
    result = train(config, out=None)
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        images = pmf.sample(
            result.model,
            labels,
            steps=1,
            omega=config.sampling.sample_omega,
            interval=(low, high),
            generator=torch.Generator().manual_seed(seed),
        )
    samples = images.float().clamp(-1, 1).flatten(1)
    accuracy = float(np.mean(svm.predict(samples.numpy()) == labels.numpy()))
    return {
        "seed": seed,
        "accuracy": accuracy,
        **spread(pixels, samples),
        "steps": result.step,
        "seconds": seconds,
    }


def worst(scores: list[dict[str, float]]) -> dict[str, float]:
    """The worst value of each score over the seeds: the largest distance, the smallest of the others."""
    return {name: (max if name == "frechet" else min)(score[name] for score in scores) for name in FIGURES}


def line(figures: dict[str, float]) -> str:
    return " ".join(f"{name}={figures[name]:.4f}" for name in FIGURES if name in figures)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds to train, from 0")
    parser.add_argument("--minutes", type=float, default=10.0, help="training time for each seed")
    parser.add_argument("--out", type=Path, help="write the record to this JSON file")
    arguments = parser.parse_args()

    pixels, labels = real_digits()
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    held_out = float(cross_val_score(classifier(), pixels.numpy(), labels.numpy(), cv=folds).mean())
    svm = classifier().fit(pixels.numpy(), labels.numpy())
    halves = real_halves(pixels, labels)
    print(f"SVM on held-out digits: {held_out:.4f}; two halves of the real set: {line(halves)}", flush=True)

    scores = []
    for seed in range(arguments.seeds):
        scores.append(train_and_score(seed, arguments.minutes, pixels, labels, svm))
        print(f"seed {seed}: {line(scores[-1])} ({scores[-1]['steps']} steps)", flush=True)
    if arguments.out:
        config = get_preset("digits", minutes=arguments.minutes)
        record = {
            "command": " ".join(["python", *sys.argv]),
            "device": pmf.env.cpu_name(),
            "threads": torch.get_num_threads(),
            "versions": {
                "pmf": pmf.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "omega": config.sampling.sample_omega,
            "interval": config.sampling.sample_interval,
            "svm_held_out_accuracy": held_out,
            "real_halves": halves,
            "seeds": scores,
            "worst": worst(scores),
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(line(worst(scores)))


if __name__ == "__main__":
    main()
