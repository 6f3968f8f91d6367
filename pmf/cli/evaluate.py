"""``pmf evaluate``: FID and Inception Score of a model's samples or of any images."""

import argparse
import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from pmf import checkpoint
from pmf.atomic import write_file
from pmf.cli.arguments import Commands, word_by
from pmf.cli.sample import BATCH_SIZE_HELP, choose_batch_size, choose_classes, refuse_unlearned_guidance
from pmf.devices import find_device
from pmf.errors import UserError
from pmf.evaluation import (
    SPACES,
    FeatureSpace,
    ImageSource,
    Samples,
    Some,
    Statistics,
    Sums,
    count_features,
    describe,
    file_digest,
    open_images,
    open_space,
    read_statistics,
    weights_digest,
    write_statistics,
)
from pmf.flow.sampler import PRECISIONS, Sampler, sampling_times
from pmf.metrics import frechet_of_moments
from pmf.ranks import Ranks, joined_ranks
from pmf.sizes import parse_size

_DESCRIPTION = """Compute the Frechet distance between two sets of images (FID with Inception features).

The images are class-balanced samples from a checkpoint, or the source given with --images. The reference is a
statistics file (.npz with mu and sigma, as written by pytorch-fid, ADM, EDM and the MeanFlow trainers), a
folder of images, an .npz of images (arr_0), or a dataset such as digits.

  pmf evaluate pMF-B-16.pth --reference imagenet256.npz --weights pt_inception-2015-12-05-6726825d.pth
  pmf evaluate runs/00000-digits --features pixels --reference digits --num-images 1797
  pmf evaluate --images imagenet/train --image-size 256 --make-stats imagenet256.npz
  torchrun --nproc-per-node 8 -m pmf evaluate pMF-H-16.pth --reference imagenet256.npz --device cuda

Feature sums are saved to --out about once a minute: the same command, on any number of processes, resumes
where it stopped. Results are written to --out/result.json. Samples are not stored unless --keep is given.
"""
_QUICK = 20  # images in a --quick run
_SAMPLING: dict[str, Any] = {"classes": None, "seed": 0, "keep": None, "ema": None, "steps": 1, "times": None}
_SAMPLING |= {"omega": None, "interval": None, "precision": "auto"}
"""The flags that apply to samples, and their defaults."""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser("evaluate", help="FID and Inception Score", description=_DESCRIPTION)
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        help="run or checkpoint folder, .safetensors, the authors' .pth, or digits, which is built in",
    )
    parser.add_argument("--images", metavar="SOURCE", help="a folder, .npz or dataset to evaluate")
    parser.add_argument("--reference", metavar="SOURCE", help="statistics or images to compare with")
    parser.add_argument(
        "--make-stats", type=Path, metavar="FILE", help="write the statistics of the images to this .npz"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("evaluation"), help="folder for sums and result.json (%(default)s)"
    )
    parser.add_argument(
        "--num-images", type=int, metavar="N", help="images to evaluate (50000; all of --images)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"smoke test: use {_QUICK} images on each side",
    )
    features = parser.add_argument_group("Features")
    features.add_argument(
        "--features", choices=SPACES, default="inception", help="feature space (%(default)s: FID)"
    )
    features.add_argument("--weights", type=Path, metavar="FILE", help="weights of the feature network")
    features.add_argument(
        "--image-size",
        type=word_by(parse_size),
        metavar="SIZE",
        help="centre-crop image files to this size in pixels: a number for squares, or HEIGHTxWIDTH",
    )
    features.add_argument(
        "--channels", type=int, choices=(1, 3), help="read image files as greyscale (1) or colour (3)"
    )
    sampling = parser.add_argument_group("Samples")
    sampling.add_argument("--classes", nargs="+", metavar="CLASS", help="class names or numbers (all)")
    sampling.add_argument(
        "--seed", type=int, help="seed of the first sample; sample i uses seed + i (%(default)s)"
    )
    sampling.add_argument("--keep", type=Path, metavar="FOLDER", help="save all samples, a folder per class")
    sampling.add_argument("--ema", help="averaged weights to use: a half-life such as 500, or none")
    sampling.add_argument("--steps", type=int, help="network evaluations per image (%(default)s)")
    sampling.add_argument(
        "--times", nargs="+", type=float, metavar="T", help="evaluate at these times instead, e.g. 1 0.6 0"
    )
    sampling.add_argument("--omega", type=float, help="guidance scale, at least 1 (the model's)")
    sampling.add_argument(
        "--interval", nargs=2, type=float, metavar=("MIN", "MAX"), help="guidance interval (the model's)"
    )
    sampling.add_argument("--precision", choices=PRECISIONS, help="as for pmf sample")
    parser.add_argument("--batch-size", type=int, metavar="N", help=BATCH_SIZE_HELP)
    parser.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    parser.set_defaults(run=run, **_SAMPLING)


def run(arguments: argparse.Namespace) -> int:
    """Accumulate the features of all images, compare, and write the result."""
    _check(arguments)
    with joined_ranks() as ranks:
        try:
            task = ranks.together(lambda: _prepare(arguments, ranks))
        except UserError:
            if ranks.first:
                raise
            return 2  # all ranks raise the same error; rank 0 prints it
        try:
            return _evaluate(arguments, task, ranks)
        except KeyboardInterrupt:
            if ranks.first:
                again = "interrupted: the same command continues from the sums in"
                print(f"{again} {arguments.out}", file=sys.stderr)
            raise


class _Task(NamedTuple):
    """A comparison: images, feature space, and reference statistics or the images to compute them from."""

    source: ImageSource
    space: FeatureSpace
    reference: Statistics | None
    compared: ImageSource | None
    batch_size: int


def _prepare(arguments: argparse.Namespace, ranks: Ranks) -> _Task:
    """Open all inputs, so that errors appear before any image is generated."""
    device = find_device(ranks.device(arguments.device))
    batch_size = choose_batch_size(arguments.batch_size, device)
    source = _open_source(arguments, device)
    channels, *size = source.shape
    space = open_space(
        arguments.features,
        channels=channels,
        size=(size[0], size[1]),
        device=device,
        weights=arguments.weights,
    )
    return _Task(source, space, *_find_reference(arguments, space, source), batch_size)


def _evaluate(arguments: argparse.Namespace, task: _Task, ranks: Ranks) -> int:
    source, space, reference, compared, batch_size = task
    sums = _count("samples", source, space, batch_size, arguments.out, ranks)
    found = _statistics(sums)
    if compared is not None:
        reference = _statistics(_count("reference", compared, space, batch_size, arguments.out, ranks))
    if not ranks.first:
        return 0
    if arguments.make_stats is not None:
        write_statistics(arguments.make_stats, found, space, len(source))
        print(f"statistics of {len(source)} images: {arguments.make_stats}")
    if reference is None:
        return 0
    figures = _figures(space, found, reference, sums)
    compared_with = {"sha256": _digest(arguments.reference)} if compared is None else compared.identity()
    record = {
        "command": shlex.join(["pmf", *sys.argv[1:]]),
        "title": space.title,
        **figures,
        **describe(source, space, batch_size),
        "reference": arguments.reference,
        "compared_with": compared_with,
    }
    write_file(arguments.out / "result.json", (json.dumps(record, indent=2) + "\n").encode())
    print(_sentence(space, len(source), figures))
    print(f"record: {arguments.out / 'result.json'}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Reject invalid arguments before opening anything."""
    if (arguments.checkpoint is None) == (arguments.images is None):
        raise UserError("give either a checkpoint to sample from or --images")
    if arguments.images is not None:
        for name, default in _SAMPLING.items():
            if getattr(arguments, name) != default:
                raise UserError(f"--{name} applies to samples, not to --images: leave it out")
    if arguments.reference is None and arguments.make_stats is None:
        raise UserError("give --reference to compare, or --make-stats to write the statistics of the images")
    if arguments.make_stats is not None and arguments.make_stats.suffix != ".npz":
        raise UserError(f"--make-stats must end in .npz, got {arguments.make_stats}")
    if arguments.make_stats is not None and arguments.make_stats.exists():
        raise UserError(f"{arguments.make_stats} already exists: choose another name")
    for name in ("steps", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    try:
        sampling_times(arguments.steps, arguments.times)
    except ValueError as error:
        raise UserError(str(error)) from error
    if arguments.num_images is not None and arguments.num_images < 2:
        raise UserError(f"--num-images must be 2 or more, got {arguments.num_images}")
    if not 0 <= arguments.seed < 2**62:
        raise UserError(f"--seed must lie between 0 and 2^62, got {arguments.seed}")
    if arguments.omega is not None and not arguments.omega >= 1:
        raise UserError(f"--omega must be at least 1 (1 is no guidance), got {arguments.omega}")
    if arguments.interval is not None and not 0 <= arguments.interval[0] <= arguments.interval[1] <= 1:
        low, high = arguments.interval
        raise UserError(f"--interval must be 0 <= MIN <= MAX <= 1, got {low} and {high}")


def _open_source(arguments: argparse.Namespace, device: torch.device) -> ImageSource:
    if arguments.images is not None:
        source = open_images(arguments.images, channels=arguments.channels, size=arguments.image_size)
        if len(source) < 2:
            raise UserError(f"{arguments.images} contains one image: a distance needs at least two")
        if arguments.quick:
            return _few(source)
        return source if arguments.num_images is None else Some(source, arguments.num_images)
    if arguments.image_size is not None or arguments.channels is not None:
        raise UserError("--image-size and --channels apply to --images: samples have the model's size")
    loaded = checkpoint.load_model(arguments.checkpoint, arguments.ema, v_head=False)
    refuse_unlearned_guidance(loaded, arguments.omega, arguments.interval)
    # A sharded checkpoint's path is its header, which says nothing about the weights.
    digest = file_digest(loaded.path) if loaded.part is None else weights_digest(loaded.model)
    names = loaded.class_names
    classes = list(range(len(names)))
    if arguments.classes is not None:
        classes = choose_classes(arguments.classes, names)
    try:
        sampler = Sampler(loaded.model.to(device), arguments.precision)
    except RuntimeError as error:  # does not fit on the device
        raise UserError(str(error).splitlines()[0]) from error
    return Samples(
        sampler,
        {"checkpoint": str(loaded.path), "part": loaded.part, "sha256": digest},
        classes,
        _QUICK if arguments.quick else arguments.num_images or 50_000,
        seed=arguments.seed,
        steps=arguments.steps,
        times=arguments.times,
        omega=arguments.omega,
        interval=None if arguments.interval is None else tuple(arguments.interval),
        keep=arguments.keep,
    )


def _find_reference(
    arguments: argparse.Namespace, space: FeatureSpace, source: ImageSource
) -> tuple[Statistics | None, ImageSource | None]:
    """The reference statistics, or the images to compute them from."""
    if arguments.reference is None:
        return None, None
    if arguments.reference.endswith(".npz"):
        statistics = read_statistics(Path(arguments.reference), space)
        if statistics is not None:
            return statistics, None
    images = open_images(arguments.reference, channels=source.shape[0], size=source.shape[1:])
    if len(images) < 2:
        raise UserError(f"{arguments.reference} contains one image: a distance needs at least two")
    return None, _few(images) if arguments.quick else images


def _digest(statistics: str) -> str:
    return file_digest(Path(os.path.expanduser(statistics)))


def _few(source: ImageSource) -> ImageSource:
    return Some(source, min(_QUICK, len(source)))


def _count(
    name: str, source: ImageSource, space: FeatureSpace, batch_size: int, out: Path, ranks: Ranks
) -> Sums:
    hidden = None if ranks.first else True  # None: show the bar only on a terminal
    with tqdm(total=len(source), desc=name, unit="image", disable=hidden) as bar:
        return count_features(source, space, batch_size, out / f"{name}.safetensors", ranks, bar.update)


def _statistics(sums: Sums) -> Statistics:
    mean, covariance = sums.moments.mean_and_covariance()
    return Statistics(mean.cpu(), covariance.cpu())


def _figures(space: FeatureSpace, found: Statistics, reference: Statistics, sums: Sums) -> dict[str, Any]:
    pairs = dataclasses.astuple(found), dataclasses.astuple(reference)
    try:
        figures: dict[str, Any] = {"frechet_distance": frechet_of_moments(*pairs[0], *pairs[1])}
    except ValueError as error:
        raise UserError(str(error)) from error
    if sums.score is not None:
        mean, deviation = sums.score.score()
        figures |= {"inception_score": mean, "inception_score_deviation": deviation}
    return figures


def _sentence(space: FeatureSpace, images: int, figures: dict[str, Any]) -> str:
    sentence = f"{space.title} of {images} images: {figures['frechet_distance']:.4f}"
    if "inception_score" in figures:
        sentence += (
            f"; Inception Score: {figures['inception_score']:.3f} "
            f"(standard deviation over splits {figures['inception_score_deviation']:.3f})"
        )
    if images < space.width:
        sentence += (
            f"\nfewer images than feature dimensions ({space.width}): compare equal numbers of images only"
        )
    return sentence
