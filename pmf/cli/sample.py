"""``pmf sample``: images and a grid, by class and seed."""

import argparse
import os
import re
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from pmf import checkpoint
from pmf.cli.arguments import Commands
from pmf.devices import find_device
from pmf.errors import UserError, first_few
from pmf.flow.sampler import PRECISIONS, Sampler, sampling_times
from pmf.interrupts import INTERRUPTED, catch_stop_signals
from pmf.pictures import ImageGrid, save_png
from pmf.sampling import draw_by_seed

_DESCRIPTION = """Sample an image per class and seed, and draw grid.png: a row per class, a column per seed.

A seed determines one noise image: the same seed gives the same picture, whatever else is in the batch. Each
batch is written before the next is computed, so memory does not grow with the number of images and Ctrl-C
loses no image already written. If the grid would be too large, it shows the first classes and seeds only.

  pmf sample digits --classes all
  pmf sample runs/00000-digits --classes 3 7 --seeds 0-19
  pmf sample pMF-B-16.pth --classes 207 --seeds 0-3 --omega 7.5 --interval 0.1 0.8 --out golden-retrievers
  pmf sample pMF-B-16.pth --classes all --seeds 0-49 --out fifty-thousand
"""
_BATCH_ON_CPU, _BATCH_ELSEWHERE = 16, 64  # larger batches do not fit a CPU's caches
BATCH_SIZE_HELP = f"images per batch ({_BATCH_ON_CPU} on a CPU, otherwise {_BATCH_ELSEWHERE})"
_MAX_NAME = 60  # characters of a class name used in file names
_GRID_SIDE = 4096  # maximum side of the grid in pixels, unless a single image is larger
_WRITERS = 8  # maximum number of threads that compress and write


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser("sample", help="sample images from a checkpoint", description=_DESCRIPTION)
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="run or checkpoint folder, .safetensors, the authors' .pth, or digits, which is built in",
    )
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="class names or numbers, or all (the first ten classes)"
    )
    parser.add_argument("--seeds", default="0-9", help="seeds and ranges, e.g. 0-7,12 (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="output folder (%(default)s)")
    parser.add_argument("--ema", help="averaged weights to use: a half-life such as 500, or none")
    parser.add_argument("--steps", type=int, default=1, help="network evaluations per image (%(default)s)")
    parser.add_argument(
        "--times", nargs="+", type=float, metavar="T", help="evaluate at these times instead, e.g. 1 0.6 0"
    )
    parser.add_argument("--omega", type=float, help="guidance scale, at least 1 (the model's)")
    parser.add_argument(
        "--interval", nargs=2, type=float, metavar=("MIN", "MAX"), help="guidance interval (the model's)"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help=BATCH_SIZE_HELP)
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="bf16: matrix products in bfloat16; auto: bf16 if the device supports it and the network is at "
        "least 256 wide",
    )
    parser.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    parser.set_defaults(run=run)


class _Job(NamedTuple):
    """One image to sample: its position in the grid, class and seed."""

    row: int
    column: int
    label: int
    seed: int


def run(arguments: argparse.Namespace) -> int:
    """Sample batch by batch, write the images, and report where they are."""
    device = find_device(arguments.device)
    batch_size = choose_batch_size(arguments.batch_size, device)
    if arguments.steps < 1 or batch_size < 1:
        raise UserError("--steps and --batch-size must be 1 or more")
    try:
        sampling_times(arguments.steps, arguments.times)
    except ValueError as error:
        raise UserError(str(error)) from error
    seeds = parse_seeds(arguments.seeds)
    sampler, names, source = _open_sampler(arguments, device)
    classes = choose_classes(arguments.classes, names)
    columns = sum(part.stop - part.start for part in seeds)
    jobs = (
        _Job(row, column, label, seed)
        for row, label in enumerate(classes)
        for column, seed in enumerate(chain.from_iterable(seeds))
    )
    total = len(classes) * columns
    album = _Album(arguments.out, names, sampler, len(classes), columns)
    try:
        bar = tqdm(total=total, unit="image", disable=None)  # None: show the bar only on a terminal
        with album, bar, catch_stop_signals() as stop:
            while not stop.is_set() and (batch := list(islice(jobs, batch_size))):
                album.write(batch, _draw(sampler, batch, arguments))
                bar.update(len(batch))
    except KeyboardInterrupt:  # a second Ctrl-C
        pass
    if album.written < total:
        print(f"interrupted: {album.written} of {total} images are in {arguments.out}", file=sys.stderr)
        return INTERRUPTED
    grid = album.write_grid()
    print(f"{total} images in {sampler.precision} from {source}")
    print(f"grid{album.left_out}: {grid}")
    return 0


def _open_sampler(arguments: argparse.Namespace, device: torch.device) -> tuple[Sampler, list[str], Path]:
    """The sampler, its class names and the file it came from; other weights in the file are freed."""
    loaded = checkpoint.load_model(arguments.checkpoint, arguments.ema, v_head=False)
    refuse_unlearned_guidance(loaded, arguments.omega, arguments.interval)
    try:
        return Sampler(loaded.model.to(device), arguments.precision), loaded.class_names, loaded.path
    except RuntimeError as error:  # does not fit on the device
        raise UserError(str(error).splitlines()[0]) from error


def _draw(sampler: Sampler, jobs: Sequence[_Job], arguments: argparse.Namespace) -> torch.Tensor:
    interval = None if arguments.interval is None else tuple(arguments.interval)
    return draw_by_seed(
        sampler,
        [job.label for job in jobs],
        [job.seed for job in jobs],
        steps=arguments.steps,
        times=arguments.times,
        omega=arguments.omega,
        interval=interval,
    ).cpu()


class _Album:
    """The output folder, written batch by batch, and the grid of its first images."""

    def __init__(self, folder: Path, names: list[str], sampler: Sampler, rows: int, columns: int) -> None:
        self.folder, self.names = folder, names
        self.written, self._lock = 0, threading.Lock()
        self._threads = ThreadPoolExecutor()  # writes the current batch
        self._writing: list[Future[None]] = []
        config = sampler.network.config
        _, height, width = config.image_shape
        self.rows = min(rows, max(1, _GRID_SIDE // height))
        self.columns = min(columns, max(1, _GRID_SIDE // width))
        self.grid = ImageGrid(self.rows, self.columns, config.image_shape)
        is_whole = (self.rows, self.columns) == (rows, columns)
        self.left_out = "" if is_whole else f" of {self.rows} x {self.columns} of {rows} x {columns} images"

    def __enter__(self) -> "_Album":
        return self

    def __exit__(self, *error: object) -> None:
        """Finish files that have been started, even if Ctrl-C interrupted `write`.

        Wait for the futures, not for the threads: in Python 3.11 an interrupted join marks its thread as
        finished, so the last file would not be counted.
        """
        for file in self._writing:
            file.cancel()
        wait(self._writing)
        self._threads.shutdown()

    def write(self, jobs: Sequence[_Job], pictures: torch.Tensor) -> None:
        """Write the pictures in parallel, because compression is slow."""
        with ThreadPoolExecutor(min(_WRITERS, os.cpu_count() or 1)) as self._threads:
            self._writing.clear()
            for job, picture in zip(jobs, pictures, strict=True):
                self._writing.append(self._threads.submit(self._write_one, job, picture))
        for file in self._writing:
            file.result()
        for job, picture in zip(jobs, pictures, strict=True):
            if job.row < self.rows and job.column < self.columns:
                self.grid.put(job.row, job.column, picture)

    def write_grid(self) -> Path:
        path = self.folder / "grid.png"
        self._save(self.grid.picture(), path)
        return path

    def _write_one(self, job: _Job, picture: torch.Tensor) -> None:
        stem = file_stem(job.label, self.names[job.label])
        self._save(picture, self.folder / f"{stem}_seed{job.seed:04d}.png")
        with self._lock:
            self.written += 1

    def _save(self, picture: torch.Tensor, path: Path) -> None:
        try:
            save_png(picture, path)
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder}: {error.strerror or error} (after {self.written} images)"
            ) from error


def choose_batch_size(given: int | None, device: torch.device) -> int:
    """The number of images sampled at once on a device, unless it is given."""
    if given is not None:
        return given
    return _BATCH_ON_CPU if device.type == "cpu" else _BATCH_ELSEWHERE


def refuse_unlearned_guidance(
    loaded: checkpoint.LoadedModel, omega: float | None, interval: list[float] | None
) -> None:
    """UserError for guidance of a network trained without, which has only seen omega 1, interval 0 to 1."""
    for flag, is_usual in (("omega", omega in (None, 1)), ("interval", interval in (None, [0, 1]))):
        if is_usual:
            continue
        objective = checkpoint.trained_settings(loaded.path).get("objective")
        if isinstance(objective, dict) and objective.get("guidance") is False:
            raise UserError(f"{loaded.path} was trained without guidance: leave out --{flag}")


def parse_seeds(text: str) -> list[range]:
    """Parse ``0-3,7`` as the ranges 0-3 and 7-7, of any length."""
    seeds: list[range] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--seeds must be numbers and ascending ranges such as 0-7,12, got {text!r}")
        if int(match[2] or match[1]) >= 2**63:
            raise UserError(f"--seeds must lie below 2^63, got {text!r}")
        new = range(int(match[1]), int(match[2] or match[1]) + 1)
        for old in seeds:  # two threads must not write the same file
            if new.start < old.stop and old.start < new.stop:
                raise UserError(f"--seeds contains {max(old.start, new.start)} twice: {text!r}")
        seeds.append(new)
    return seeds


def choose_classes(wanted: list[str] | None, names: list[str]) -> list[int]:
    """Class indices for names or, if no class has that name, numbers; the first ten classes by default."""
    if wanted is None:
        return list(range(min(10, len(names))))
    if wanted == ["all"] and "all" not in names:
        return list(range(len(names)))
    chosen: list[int] = []
    for word in wanted:
        if word in names:
            chosen.append(names.index(word))
        elif word.isdecimal() and int(word) < len(names):
            chosen.append(int(word))
        else:
            raise UserError(
                f"there is no class {word!r}: the model knows {first_few(names, 10)}"
                + (f", by number 0 to {len(names) - 1}" if len(names) > 10 else "")
            )
    return list(dict.fromkeys(chosen))


def file_stem(label: int, name: str) -> str:
    """The file name stem of a class: its number, plus its name if that adds information."""
    safe = re.sub(r"[^\w.-]+", "_", name)[:_MAX_NAME]
    return f"class{label:04d}" if name == str(label) else f"class{label:04d}-{safe}"
