"""``pmf evaluate``: FID and Inception Score of a model's samples, or of any images."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from pmf import checkpoint
from pmf.atomic import write_file
from pmf.cli.arguments import Commands, word_by
from pmf.cli.sample import choose_classes
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
    write_statistics,
)
from pmf.flow.sampler import PRECISIONS, Sampler, sampling_times
from pmf.metrics import frechet_of_moments
from pmf.ranks import Ranks, joined_ranks
from pmf.sizes import parse_size

_DESCRIPTION = """Compare images by the Frechet distance of their features, FID if these are Inception's.

The images are samples of a checkpoint, class-balanced, or given with --images. They are compared with a file
of statistics (.npz with mu and sigma, as pytorch-fid, ADM, EDM and the MeanFlow trainers write them), with a
folder of images, with a .npz of images (arr_0), or with a data set such as digits.

  pmf evaluate pMF-B-16.pth --reference imagenet256.npz --weights pt_inception-2015-12-05-6726825d.pth
  pmf evaluate runs/00000-digits --features pixels --reference digits --num-images 1797
  pmf evaluate --images imagenet/train --image-size 256 --make-stats imagenet256.npz
  torchrun --nproc-per-node 8 -m pmf evaluate pMF-H-16.pth --reference imagenet256.npz --device cuda

Sums of the features are kept in --out, about once a minute: the same command, on any number of processes,
goes on where it was stopped. The figures are in --out/result.json. Without --keep no image is stored.
"""
_BATCH_ON_CPU, _BATCH_ELSEWHERE = 16, 64
_QUICK = 20  # images of a look whether a command works


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser("evaluate", help="FID and Inception Score", description=_DESCRIPTION)
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        help="a run's or checkpoint's folder, .safetensors, or the authors' .pth",
    )
    parser.add_argument("--images", metavar="SOURCE", help="a folder, .npz or data set in place of samples")
    parser.add_argument("--reference", metavar="SOURCE", help="what to compare with: statistics or images")
    parser.add_argument(
        "--make-stats", type=Path, metavar="FILE", help="write the images' own statistics to this .npz"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("evaluation"), help="folder of sums and result.json (%(default)s)"
    )
    parser.add_argument("--num-images", type=int, metavar="N", help="how many (50000; all of --images)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{_QUICK} images on each side: whatever else is asked: to see that a command works",
    )
    features = parser.add_argument_group("Features")
    features.add_argument(
        "--features", choices=SPACES, default="inception", help="feature space (%(default)s: FID)"
    )
    features.add_argument("--weights", type=Path, metavar="FILE", help="weights of the features' network")
    features.add_argument(
        "--image-size",
        type=word_by(parse_size),
        metavar="SIZE",
        help="cut the centres of image files to so many pixels: a number for squares, or HEIGHTxWIDTH",
    )
    features.add_argument(
        "--channels", type=int, choices=(1, 3), help="read the files of --images as grey (1) or colour (3)"
    )
    sampling = parser.add_argument_group("Samples")
    sampling.add_argument("--classes", nargs="+", metavar="CLASS", help="class names or numbers (all)")
    sampling.add_argument(
        "--seed", type=int, default=0, help="seed of the first; i is of seed + i (%(default)s)"
    )
    sampling.add_argument("--keep", type=Path, metavar="FOLDER", help="keep all samples, a folder per class")
    sampling.add_argument("--ema", help="which averaged weights of a run: a half-life such as 500, or none")
    sampling.add_argument("--steps", type=int, default=1, help="network evaluations per image (%(default)s)")
    sampling.add_argument(
        "--times", nargs="+", type=float, metavar="T", help="evaluate at these times instead, such as 1 0.6 0"
    )
    sampling.add_argument("--omega", type=float, help="guidance scale, 1 or more (the model's own)")
    sampling.add_argument(
        "--interval", nargs=2, type=float, metavar=("MIN", "MAX"), help="guidance interval (the model's own)"
    )
    sampling.add_argument("--precision", choices=PRECISIONS, default="auto", help="as for pmf sample")
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"images at a time ({_BATCH_ON_CPU} on a CPU, else {_BATCH_ELSEWHERE})",
    )
    parser.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Count the features of all images, compare, and record."""
    _check(arguments)
    with joined_ranks() as ranks:
        try:
            task = ranks.together(lambda: _prepare(arguments, ranks))
        except UserError:
            if ranks.first:
                raise
            return 2  # every rank knows the sentence; one says it
        try:
            return _evaluate(arguments, task, ranks)
        except KeyboardInterrupt:
            if ranks.first:
                again = "interrupted: the same command goes on from the sums in"
                print(f"{again} {arguments.out}", file=sys.stderr)
            raise


class _Task(NamedTuple):
    """What to compare: the images, in a space, with statistics or with the images to count for them."""

    source: ImageSource
    space: FeatureSpace
    reference: Statistics | None
    compared: ImageSource | None
    batch_size: int


def _prepare(arguments: argparse.Namespace, ranks: Ranks) -> _Task:
    """Open everything, so that what cannot be used is said before anything is drawn."""
    device = find_device(ranks.device(arguments.device))
    batch_size = arguments.batch_size or (_BATCH_ON_CPU if device.type == "cpu" else _BATCH_ELSEWHERE)
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
    record = {
        "command": " ".join(["pmf", *sys.argv[1:]]),
        "title": space.title,
        **figures,
        **describe(source, space, batch_size),
        "reference": arguments.reference,
    }
    write_file(arguments.out / "result.json", (json.dumps(record, indent=2) + "\n").encode())
    print(_sentence(space, len(source), figures))
    print(f"record: {arguments.out / 'result.json'}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """What can be known to be wrong before anything is opened."""
    if (arguments.checkpoint is None) == (arguments.images is None):
        raise UserError("give a checkpoint to sample from or --images, one of the two")
    if arguments.reference is None and arguments.make_stats is None:
        raise UserError("give --reference to compare with, or --make-stats to write the images' statistics")
    if arguments.make_stats is not None and arguments.make_stats.suffix != ".npz":
        raise UserError(f"--make-stats must end in .npz, got {arguments.make_stats}")
    if arguments.make_stats is not None and arguments.make_stats.exists():
        raise UserError(f"{arguments.make_stats} exists: choose another name")
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
        raise UserError(f"--seed must lie from 0 to 2^62, got {arguments.seed}")
    if arguments.omega is not None and not arguments.omega >= 1:
        raise UserError(f"--omega must be at least 1 (1 is no guidance), got {arguments.omega}")
    if arguments.interval is not None and not 0 <= arguments.interval[0] <= arguments.interval[1] <= 1:
        low, high = arguments.interval
        raise UserError(f"--interval must be 0 <= MIN <= MAX <= 1, got {low} and {high}")


def _open_source(arguments: argparse.Namespace, device: torch.device) -> ImageSource:
    if arguments.images is not None:
        if arguments.classes is not None or arguments.keep is not None:
            raise UserError("--classes and --keep are for samples, not for --images")
        source = open_images(arguments.images, channels=arguments.channels, size=arguments.image_size)
        if len(source) < 2:
            raise UserError(f"{arguments.images} holds one image: a distance needs two or more")
        if arguments.quick:
            return _few(source)
        return source if arguments.num_images is None else Some(source, arguments.num_images)
    if arguments.image_size is not None or arguments.channels is not None:
        raise UserError("--image-size and --channels are for --images: samples are of the model's own size")
    loaded = checkpoint.load_model(arguments.checkpoint, arguments.ema, v_head=False)
    names = loaded.class_names
    classes = list(range(len(names)))
    if arguments.classes is not None:
        classes = choose_classes(arguments.classes, names)
    try:
        sampler = Sampler(loaded.model.to(device), arguments.precision)
    except RuntimeError as error:  # too large for the device
        raise UserError(str(error).splitlines()[0]) from error
    return Samples(
        sampler,
        {"checkpoint": str(loaded.path), "sha256": file_digest(loaded.path)},
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
    """The reference's statistics, or the images that have to be counted for them."""
    if arguments.reference is None:
        return None, None
    if arguments.reference.endswith(".npz"):
        statistics = read_statistics(Path(arguments.reference), space)
        if statistics is not None:
            return statistics, None
    images = open_images(arguments.reference, channels=source.shape[0], size=source.shape[1:])
    if len(images) < 2:
        raise UserError(f"{arguments.reference} holds one image: a distance needs two or more")
    return None, _few(images) if arguments.quick else images


def _few(source: ImageSource) -> ImageSource:
    return Some(source, min(_QUICK, len(source)))


def _count(
    name: str, source: ImageSource, space: FeatureSpace, batch_size: int, out: Path, ranks: Ranks
) -> Sums:
    hidden = None if ranks.first else True  # None: a bar on a terminal alone
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
            f"(deviation of the parts {figures['inception_score_deviation']:.3f})"
        )
    if images < space.width:
        sentence += f"\nfewer images than the {space.width} numbers of a feature: compare equal numbers only"
    return sentence
