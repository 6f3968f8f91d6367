"""``pmf sample``: single images and a grid, by class and seed."""

import argparse
import re
from pathlib import Path

import torch

from pmf import checkpoint, flow
from pmf.cli.arguments import Commands
from pmf.data import image_grid, save_png
from pmf.devices import find_device
from pmf.errors import UserError
from pmf.models import PixelMeanFlow

_DESCRIPTION = """Draw one file for every class and seed, and grid.png with a class a row and a seed a column.

A seed stands for one noise image: the same seed gives the same picture whatever else is drawn with it.

  pmf sample runs/00000-digits --classes 3 7 --seeds 0-19
  pmf sample pMF-B-16.pth --classes 207 --seeds 0-3 --omega 7.5 --interval 0.1 0.8 --out golden-retrievers
"""
_MAX_NAME = 60  # characters of a class name that go into a file name


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser("sample", help="draw images from a checkpoint", description=_DESCRIPTION)
    parser.add_argument(
        "checkpoint", type=Path, help="a run's or checkpoint's folder, .safetensors, or the authors' .pth"
    )
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="class names or numbers (the first ten classes)"
    )
    parser.add_argument("--seeds", default="0-9", help="numbers and ranges, such as 0-7,12 (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder to write (%(default)s)")
    parser.add_argument("--ema", help="which averaged weights of a run: a half-life such as 500, or none")
    parser.add_argument("--steps", type=int, default=1, help="network evaluations per image (%(default)s)")
    parser.add_argument("--omega", type=float, help="guidance scale, 1 or more (the model's own)")
    parser.add_argument(
        "--interval", nargs=2, type=float, metavar=("MIN", "MAX"), help="guidance interval (the model's own)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images drawn at a time (%(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw, write, and say where."""
    if arguments.steps < 1 or arguments.batch_size < 1:
        raise UserError("--steps and --batch-size must be 1 or more")
    device = find_device(arguments.device)
    seeds = parse_seeds(arguments.seeds)
    loaded = checkpoint.load_model(arguments.checkpoint, arguments.ema)
    classes = choose_classes(arguments.classes, loaded.class_names)
    jobs = [(label, seed) for label in classes for seed in seeds]
    try:
        model = loaded.model.to(device)
        images = []
        for start in range(0, len(jobs), arguments.batch_size):
            images.append(_draw(model, jobs[start : start + arguments.batch_size], arguments))
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error).splitlines()[0]) from error
    pictures = torch.cat(images)
    try:
        for (label, seed), picture in zip(jobs, pictures, strict=True):
            stem = file_stem(label, loaded.class_names[label])
            save_png(picture, arguments.out / f"{stem}_seed{seed:04d}.png")
        save_png(image_grid(pictures, len(seeds)), arguments.out / "grid.png")
    except OSError as error:
        raise UserError(f"cannot write to {arguments.out}: {error.strerror or error}") from error
    print(f"{len(jobs)} images from {loaded.path}")
    print(f"grid: {arguments.out / 'grid.png'}")
    return 0


def _draw(model: PixelMeanFlow, jobs: list[tuple[int, int]], arguments: argparse.Namespace) -> torch.Tensor:
    config = model.config
    shape = (config.channels, config.image_size, config.image_size)
    generator = torch.Generator()
    noise = torch.stack([torch.randn(shape, generator=generator.manual_seed(seed)) for _, seed in jobs])
    labels = torch.tensor([label for label, _ in jobs], device=arguments.device)
    interval = None if arguments.interval is None else tuple(arguments.interval)
    return flow.sample(
        model,
        labels,
        steps=arguments.steps,
        omega=arguments.omega,
        interval=interval,
        noise=(config.noise_scale * noise).to(arguments.device),
    ).cpu()


def parse_seeds(text: str) -> list[int]:
    """``0-3,7`` as [0, 1, 2, 3, 7]."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--seeds must be numbers and rising ranges such as 0-7,12, got {text!r}")
        if int(match[2] or match[1]) >= 2**63:
            raise UserError(f"--seeds must lie below 2^63, got {text!r}")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return seeds


def choose_classes(wanted: list[str] | None, names: list[str]) -> list[int]:
    """Class indices for names or, where no class has that name, for numbers; without any the first ten."""
    if wanted is None:
        return list(range(min(10, len(names))))
    chosen = []
    for word in wanted:
        if word in names:
            chosen.append(names.index(word))
        elif word.isdecimal() and int(word) < len(names):
            chosen.append(int(word))
        else:
            raise UserError(
                f"there is no class {word!r}: the model knows {', '.join(names[:10])}"
                + (f" and {len(names) - 10} more, by number 0 to {len(names) - 1}" if len(names) > 10 else "")
            )
    return chosen


def file_stem(label: int, name: str) -> str:
    """A file name for a class: its number, and its name where that says more."""
    safe = re.sub(r"[^\w.-]+", "_", name)[:_MAX_NAME]
    return f"class{label:04d}" if name == str(label) else f"class{label:04d}-{safe}"
