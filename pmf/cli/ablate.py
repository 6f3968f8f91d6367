"""``pmf ablate``: train variants of a run and compare them in one table and one plot."""

import argparse
import json
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from pmf import checkpoint, env
from pmf.ablation import (
    CLASSIFIER,
    SUITES,
    Study,
    Suite,
    Variant,
    decimals,
    judge_orderings,
    summarise,
    why_unread_in_studies,
    write_report,
)
from pmf.cli.arguments import Commands, Parser, add_settings, given_settings
from pmf.cli.sample import parse_seeds
from pmf.errors import UserError
from pmf.evaluation import SPACES
from pmf.interrupts import INTERRUPTED
from pmf.training import PRESETS, TrainConfig, get_preset, why_unread
from pmf.version import VERSION

_QUICK_NETWORK = {"hidden_size": 32, "num_heads": 2}
_QUICK = {"steps": 4, "batch_size": 16, "judge_steps": 20, "samples": 64}  # at most
_DESCRIPTION = """Train variants of a run for the same number of steps and compare their one-step samples.

Every variant is trained with every seed. A classifier, trained on the real images first, scores the samples:
the Frechet distance in its feature space (not FID; comparable within one table only), or in that of
--features, and the share of samples classified as the requested class. The output folder receives table.md,
record.json and plot.png; repeating the command skips runs that have finished.

  pmf ablate --suite digits                                  the paper's ablations on the digits
  pmf ablate --suite perceptual --data package               perceptual losses on emoji, judged by AlexNet
  pmf ablate --suite paper --data /usr/share/datasets/fashion-mnist
  pmf ablate --steps 2000 --variant base= --variant adam=optimizer=adam,adam-lr=0.003 --variant u=prediction=u

A variant is NAME=flag=value,flag=value with the flags of pmf train, for example no-guidance; NAME= is the
unchanged base. --variants reads a JSON file {"NAME": {"flag": value, ...}, ...}. Settings passed to this
command apply to all variants.
"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "ablate",
        help="compare variants of a training run",
        usage="pmf ablate [--suite NAME] [--variant NAME=flag=value,...] [options]",
        description=_DESCRIPTION,
    )
    parser.add_argument("--suite", choices=list(SUITES), help="a built-in set of variants")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=...", help="add a variant")
    parser.add_argument("--variants", type=Path, metavar="FILE", help="read variants from a JSON file")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only the variants with these names")
    parser.add_argument("--preset", choices=list(PRESETS), help="base preset (the suite's, or digits)")
    parser.add_argument("--seeds", default="0-2", help="seeds and ranges, e.g. 0-2 (%(default)s)")
    parser.add_argument("--samples", type=int, help="samples per run (5000, or half the real images)")
    parser.add_argument(
        "--features",
        choices=(CLASSIFIER, *SPACES),
        help="space of the Frechet distance: the classifier's, or one of pmf evaluate (default: the suite's)",
    )
    parser.add_argument("--judge-steps", type=int, help="training steps of the classifier (1000)")
    parser.add_argument("--out", type=Path, help="output folder (ablation, or ablation-quick)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"smoke test in seconds: one seed, at most {_QUICK['steps']} steps of a network of width "
        f"{_QUICK_NETWORK['hidden_size']} and {_QUICK['samples']} samples; the results are meaningless",
    )
    add_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the unfinished runs, write the report and print it."""
    if arguments.out is None:
        arguments.out = Path("ablation-quick" if arguments.quick else "ablation")
    if arguments.quick:
        _cut(arguments)
    suite = SUITES[arguments.suite] if arguments.suite else None
    variants = _variants(arguments, suite)
    config = _base(arguments, suite)
    seeds = [0] if arguments.quick else list(chain.from_iterable(parse_seeds(arguments.seeds)))
    study = Study(
        config,
        variants,
        seeds,
        arguments.out,
        samples=arguments.samples,
        judge_steps=arguments.judge_steps,
        features=arguments.features or (suite.features if suite else CLASSIFIER),
    )
    for name in given_settings(arguments):
        reasons = [why_unread(variant, name) for variant in study.configs.values()]
        if all(reasons):
            raise UserError(f"{reasons[0]}, as in every variant: leave it out, or change that")
    total, begin = len(variants) * len(seeds), time.perf_counter()
    print(f"{arguments.out}: {len(study.finished)} of {total} runs are finished", flush=True)
    reference = study.prepare()
    print(f"the classifier is right for {reference.accuracy:.1%} of held-out images", flush=True)
    for number, (variant, seed) in enumerate(study.runs(), start=1):
        if (variant.name, seed) in study.finished:
            continue
        row = study.run(variant, seed, reference)
        if row is None:
            print(
                f"interrupted: {len(study.finished)} of {total} runs are in {arguments.out}", file=sys.stderr
            )
            return INTERRUPTED
        digits = decimals(row["frechet"])
        print(
            f"{number}/{total} {variant.name}, seed {seed}: Frechet {row['frechet']:.{digits}f}, "
            f"recognised {row['recognised']:.3f}, {row['seconds']:.0f} s",
            flush=True,
        )
    rows = [study.finished[variant.name, seed] for variant, seed in study.runs()]
    lines = summarise(rows, [variant.name for variant in variants])
    record = {
        "command": shlex.join(["pmf", *sys.argv[1:]]),
        "data": config.data.data,
        "device": _device_name(config.run.device),
        "threads": torch.get_num_threads(),
        "versions": {"pmf": VERSION, "torch": torch.__version__, "python": platform.python_version()},
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "seconds_of_this_call": round(time.perf_counter() - begin, 1),
        "runs": len(rows),
        "steps": config.run.steps,
        "batch_size": config.data.batch_size,
        "metric": {
            "features": study.features,
            "judge_steps": study.judge_steps,
            "judge_accuracy": reference.accuracy,
            "samples": study.samples,
            "real_images": reference.real,
        },
        "variants": [
            {**line, "settings": dict(variant.settings)}
            for line, variant in zip(lines, variants, strict=True)
        ],
        "orderings": judge_orderings(rows, suite.orderings if suite else ()),
        "base": config.to_json(),
    }
    written = write_report(arguments.out, record)
    print(written[0].read_text(encoding="utf-8"), end="")
    print("written: " + ", ".join(str(path) for path in written))
    return 0


def _cut(arguments: argparse.Namespace) -> None:
    """Shrink the study for --quick, including settings that were not given."""
    for name, most in _QUICK.items():
        given = getattr(arguments, name, None)
        setattr(arguments, name, most if given is None else min(given, most))
    if not hasattr(arguments, "hidden_size"):
        vars(arguments).update(_QUICK_NETWORK)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else env.cpu_name()


def _variants(arguments: argparse.Namespace, suite: Suite | None) -> list[Variant]:
    variants = list(suite.variants) if suite else []
    if arguments.variants is not None:
        variants += read_variants(arguments.variants)
    variants += [parse_variant(text) for text in arguments.variant]
    if arguments.only is None:
        return variants
    names = [variant.name for variant in variants]
    for name in arguments.only:
        if name not in names:
            raise UserError(f"--only: there is no variant {name!r}; there are {', '.join(names) or 'none'}")
    return [variant for variant in variants if variant.name in arguments.only]


def _base(arguments: argparse.Namespace, suite: Suite | None) -> TrainConfig:
    """The base configuration: preset plus command-line settings; a preset limited by time needs --steps."""
    given = given_settings(arguments)
    if "seed" in given:
        raise UserError("--seed is for a single run: use --seeds for a study")
    for name in given:
        if why := why_unread_in_studies(name):
            raise UserError(why)
    if suite is not None and arguments.preset in (None, suite.preset):
        given = {**suite.settings, **given}
    if "steps" in given and "minutes" not in given:
        given["minutes"] = None
    return get_preset(arguments.preset or (suite.preset if suite else "digits"), **given)


def parse_variant(text: str) -> Variant:
    """Parse ``NAME=flag=value,flag=value``, with the flags of `pmf train` minus the dashes."""
    name, equals, rest = text.partition("=")
    if not equals:
        raise UserError(f"--variant {text}: write NAME=flag=value,flag=value, such as adam=optimizer=adam")
    words: list[str] = []
    for part in filter(None, rest.split(",")):
        key, has_value, value = part.partition("=")
        words += [f"--{key.strip().lstrip('-')}", *(value.split() if has_value else ())]
    return Variant(name.strip(), _parse(words, name))


def read_variants(path: Path) -> list[Variant]:
    """Read variants from JSON, {"NAME": {"flag": value, ...}, ...}; UserError for any other content."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=checkpoint.without_repeats)
    except (OSError, ValueError) as error:
        raise UserError(f"--variants {path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise UserError(f'--variants {path} must contain {{"NAME": {{"flag": value, ...}}, ...}}')
    variants = []
    for name, given in content.items():
        words: list[str] = []
        for key, value in given.items():
            option = key.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            else:
                words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
        variants.append(Variant(name, _parse(words, name)))
    return variants


def _parse(words: Sequence[str], name: str) -> dict[str, Any]:
    """Parse the settings of one variant; a UserError names the variant."""
    for word, count in Counter(words).items():
        if word.startswith("--") and count > 1:  # the last would win
            raise UserError(f"variant {name!r} sets {word} twice")
    parser = Parser(prog="pmf ablate", add_help=False)
    add_settings(parser)
    try:
        return given_settings(parser.parse_args(list(words)))
    except UserError as error:
        raise UserError(f"variant {name!r}: {error}") from error
