"""Images drawn during training: a grid of one-step samples and the loss curves."""

from collections.abc import Sequence
from pathlib import Path

import torch

from pmf.atomic import write_file
from pmf.flow.sampler import sample
from pmf.models import PixelMeanFlow
from pmf.pictures import image_grid, new_figure, png_of, save_png

_GRID_SIDE = 10  # at most this many classes (rows) and samples per class (columns)


def draw_samples(model: PixelMeanFlow, seed: int, path: Path) -> torch.Tensor:
    """Draw one-step samples, a row per class, from the same noise at every step; returns the uint8 grid."""
    classes = min(_GRID_SIDE, model.config.num_classes)
    rows = (
        torch.linspace(0, model.config.num_classes - 1, classes, dtype=torch.float32, device="cpu")
        .round()
        .long()
    )
    device = next(model.parameters()).device
    generator = torch.Generator("cpu").manual_seed(seed)
    images = sample(model, rows.repeat_interleave(_GRID_SIDE).to(device), generator=generator)
    grid = image_grid(images, _GRID_SIDE)
    save_png(grid, path)
    return grid


def draw_losses(steps: Sequence[int], loss_u: Sequence[float], loss_v: Sequence[float], path: Path) -> None:
    """Plot the means of (V - v_g)^2 and (v - v_g)^2 by step on log-log axes; needs matplotlib."""
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    axes.plot(steps, loss_u, label="loss_u: mean (V - v_g)²", linewidth=1)
    axes.plot(steps, loss_v, label="loss_v: mean (v - v_g)²", linewidth=1)
    axes.set(xlabel="step", ylabel="loss per pixel", xscale="log", yscale="log")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    write_file(path, png_of(figure))
