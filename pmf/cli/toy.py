"""``pmf toy``: why the network predicts images rather than velocities, in one figure."""

import argparse
import dataclasses
import importlib.util
import json
import platform
import shlex
import sys
import time
from itertools import chain
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from pmf import env
from pmf.atomic import write_file
from pmf.cli.arguments import Commands
from pmf.cli.sample import parse_seeds
from pmf.errors import UserError
from pmf.metrics import sliced_wasserstein
from pmf.toy import PREDICTIONS, SHAPES, Job, Outcome, Settings, draw_points, train_all
from pmf.toy.picture import Panel, draw_panels
from pmf.version import VERSION

_DESCRIPTION = """Show that predicting data scales to high dimensions and predicting velocities does not.

Points in a plane are embedded in D dimensions by a random orthonormal projection. For each D, two networks
that differ only in what they predict are trained with the MeanFlow loss: x, a data point, and u, the average
velocity. toy.png shows their one-step samples, projected back, with two numbers: W, the sliced Wasserstein
distance to the data within the plane, and the mean distance from the plane. toy.json records everything.
Lengths are in standard deviations of the data. The last line printed summarises the smallest and largest D.

  pmf toy --out toy
  pmf toy --out toy --shape checkerboard --dims 2 64 --seeds 0-2
"""
_FIGURES = ("wasserstein", "off_plane", "to_data")
_DIMS, _QUICK_DIMS, _QUICK_STEPS, _QUICK_SAMPLES = [2, 8, 16, 512], [2, 512], 60, 4096
_LARGEST_DIM = 65536


def add_parser(commands: Commands) -> None:
    """Register the command."""
    settings = Settings()
    parser = commands.add_parser(
        "toy", help="x- versus u-prediction on points in a plane", description=_DESCRIPTION
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for toy.png and toy.json")
    parser.add_argument(
        "--shape", choices=list(SHAPES), default=settings.shape, help="shape of the data (%(default)s)"
    )
    parser.add_argument("--dims", type=int, nargs="+", metavar="D", help="dimensions (2 8 16 512)")
    parser.add_argument(
        "--seeds",
        "--seed",
        default="0",
        help="seeds and ranges, e.g. 0-2; numbers are means, the plot shows the first seed (%(default)s)",
    )
    parser.add_argument("--steps", type=int, help=f"training steps per network ({settings.steps})")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"smoke test in seconds: D = 2 and 512, {_QUICK_STEPS} steps, unless given",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train all networks, plot, record, and print the results."""
    dims: list[int] = sorted(arguments.dims or (_QUICK_DIMS if arguments.quick else _DIMS))
    if dims[0] < 2 or dims[-1] > _LARGEST_DIM or len(set(dims)) < len(dims):
        raise UserError(f"--dims must be distinct numbers from 2 to {_LARGEST_DIM}, got {dims}")
    steps = arguments.steps
    if steps is None:
        steps = _QUICK_STEPS if arguments.quick else Settings.steps
    if steps < 1:
        raise UserError(f"--steps must be 1 or more, got {steps}")
    seeds = list(chain.from_iterable(parse_seeds(arguments.seeds)))
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("pmf toy needs matplotlib, which is not installed: pip install matplotlib")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)  # fail now rather than after minutes of training
    num_samples = _QUICK_SAMPLES if arguments.quick else Settings.num_samples
    settings = Settings(shape=arguments.shape, steps=steps, num_samples=num_samples)

    start = time.perf_counter()
    jobs = [Job(seed, dim, prediction) for seed in seeds for dim in dims for prediction in PREDICTIONS]
    with tqdm(total=len(jobs) * steps, unit="step", disable=None) as bar:  # None: only on a terminal
        outcomes = train_all(settings, jobs, on_steps=lambda done: bar.update(done - bar.n))
    means = _means(outcomes)
    data = _data_panel(settings, seeds)
    record = {
        "command": shlex.join(["pmf", *sys.argv[1:]]),
        "device": env.cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {"pmf": VERSION, "torch": torch.__version__, "python": platform.python_version()},
        "settings": dataclasses.asdict(settings),
        "unit": "standard deviations of the data",
        "seconds": round(time.perf_counter() - start, 1),
        "data_against_data": {"wasserstein": data.wasserstein},
        "means": [
            {"dim": dim, "prediction": prediction, **figures} for (dim, prediction), figures in means.items()
        ],
        "runs": [outcome.to_json() for outcome in outcomes],
    }
    write_file(out / "toy.png", _picture(settings, seeds, dims, outcomes, means, data))
    write_file(out / "toy.json", (json.dumps(record, indent=2) + "\n").encode())
    print(_table(dims, means))
    print(f"two draws of the data: W {data.wasserstein:.4f}")
    print(f"picture: {out / 'toy.png'}")
    print(_last_line(dims[0], dims[-1], means))
    return 0


Means = dict[tuple[int, str], dict[str, float]]


def _means(outcomes: list[Outcome]) -> Means:
    """The mean of each number over the seeds, by dimension and prediction."""
    groups: dict[tuple[int, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.dim, outcome.prediction), []).append(outcome)
    return {
        key: {name: mean(getattr(outcome, name) for outcome in group) for name in _FIGURES}
        for key, group in groups.items()
    }


def _data_panel(settings: Settings, seeds: list[int]) -> Panel:
    """Data points, and the distance between two draws of them: the floor for perfect samples."""
    distances, points = [], []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed)
        one, other = (draw_points(settings.shape, settings.num_samples, generator) for _ in range(2))
        distances.append(sliced_wasserstein(one, other))
        points.append(one)
    return Panel(points[0], mean(distances), 0.0)


def _picture(
    settings: Settings,
    seeds: list[int],
    dims: list[int],
    outcomes: list[Outcome],
    means: Means,
    data: Panel,
) -> bytes:
    first = {(outcome.dim, outcome.prediction): outcome for outcome in outcomes if outcome.seed == seeds[0]}
    rows = [("data", [data] * len(dims))]
    for prediction in PREDICTIONS:
        panels = []
        for dim in dims:
            figures = means[dim, prediction]
            points = first[dim, prediction].points
            panels.append(Panel(points, figures["wasserstein"], figures["off_plane"]))
        rows.append((f"{prediction}-prediction", panels))
    caption = (
        f"One-step samples of residual MLPs of width {settings.width} after {settings.steps} steps, "
        f"projected back (seed {seeds[0]}). W: sliced Wasserstein distance in the plane. "
        "Off plane: mean distance from it in D dimensions. Units: standard deviations of the data"
        + (f"; means of {len(seeds)} seeds." if len(seeds) > 1 else ".")
    )
    return draw_panels(rows, [f"D = {dim}" for dim in dims], caption)


def _table(dims: list[int], means: Means) -> str:
    lines = ["   D  prediction  wasserstein  off plane  to data"]
    for dim in dims:
        for prediction in PREDICTIONS:
            wasserstein, off_plane, to_data = means[dim, prediction].values()
            lines.append(f"{dim:4}  {prediction:>10}  {wasserstein:11.4f}  {off_plane:9.4f}  {to_data:7.4f}")
    return "\n".join(lines)


def _last_line(smallest: int, largest: int, means: Means) -> str:
    figures = {
        f"u_off_plane_{largest}": means[largest, "u"]["off_plane"],
        f"x_off_plane_{largest}": means[largest, "x"]["off_plane"],
        f"x_wasserstein_{largest}": means[largest, "x"]["wasserstein"],
        f"x_wasserstein_{smallest}": means[smallest, "x"]["wasserstein"],
        f"u_wasserstein_{smallest}": means[smallest, "u"]["wasserstein"],
    }
    return " ".join(f"{name}={value:.4f}" for name, value in figures.items())
