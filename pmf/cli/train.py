"""``pmf train``: train a model from a preset and overrides."""

import argparse
import contextlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from pmf import checkpoint
from pmf.cli.arguments import Commands, add_settings, given_settings
from pmf.cli.settings_file import read_settings_file
from pmf.errors import UserError
from pmf.evaluation import Judge
from pmf.interrupts import INTERRUPTED
from pmf.ranks import Ranks, joined_ranks
from pmf.training import (
    PRESETS,
    Run,
    TrainConfig,
    Trainer,
    get_preset,
    new_run_folder,
    prepare,
    quick,
    refuse_unread,
    resume_config,
)

_JUDGED_AT_ONCE = 64
_DESCRIPTION = """Train a model and save a grid of samples, each from one network evaluation.

By default this trains on scikit-learn's handwritten digits for a few minutes on a CPU. The run folder
contains config.json, log.jsonl, loss.png, samples/*.png, samples.png and checkpoints/step-*.

  pmf train --minutes 10 --seed 1
  pmf train --preset pmf-b/16 --data photos --batch-size 64 --precision bf16 --out runs/photos
  pmf train --resume runs/photos --steps 500000
  torchrun --nproc-per-node 8 -m pmf train --preset pmf-b/16 --data 'shards/{000000..000063}.tar' \\
      --device cuda --parallel fsdp

--data accepts a folder with one subfolder per class; a folder with labels.csv, whose first row is file,label
and whose other rows are an image and its class; a folder with dataset.json as written by the StyleGAN and EDM
tools; WebDataset shards (.tar with <key>.jpg|png|... and <key>.cls or .json); or parquet files as written by
Hugging Face (pip install pyarrow). Images without classes, such as a flat folder, train an unconditional
model. If there are several splits (train, val, test), the first is used. Every format that Pillow opens is
read, links are followed, and a note reports what was skipped. Images are centre-cropped and rotated according
to EXIF, never mirrored. Ctrl-C finishes the step, saves a checkpoint and stops. A run can be resumed on any
number of ranks.
"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "train", help="train a model", usage="pmf train [--preset NAME] [options]", description=_DESCRIPTION
    )
    parser.add_argument(
        "--preset", choices=list(PRESETS), help="preset that supplies all other settings (digits)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="read settings from a run's config.json or from YAML keyed by flag name; flags take precedence",
    )
    parser.add_argument("--out", type=Path, help="run folder (runs/<number>-<preset>)")
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="resume from the newest checkpoint in this run folder"
    )
    parser.add_argument("--dry-run", action="store_true", help="print all settings as JSON and exit")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="smoke test: two steps of a small network on few images (or two more steps of a resumed run)",
    )
    add_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, and report where the results are."""
    with joined_ranks() as ranks:
        try:
            return _run(arguments, ranks)
        except UserError:
            if ranks.first:
                raise
            return 2  # all ranks raise the same error; rank 0 prints it


def _run(arguments: argparse.Namespace, ranks: Ranks) -> int:
    out, config = ranks.together(lambda: _choose(arguments, ranks))
    if arguments.dry_run:
        if ranks.first:
            print(json.dumps(config.to_json(), indent=2))
        return 0
    trainer = prepare(config, resume_from=arguments.resume, ranks=ranks)
    made = None
    if out is None:  # created last, so that bad settings or data leave no folder behind
        made = ranks.together(lambda: new_run_folder(Path("runs"), config.preset) if ranks.first else None)
        out = ranks.from_first(made)
    assert out is not None
    millions = sum(weight.numel() for weight in trainer.weights().values()) / 1e6
    told = print if ranks.first else _say_nothing
    told(
        f"{out}: {millions:.1f} M parameters, {len(trainer.dataset)} images "
        + (
            f"in {classes} classes"
            if (classes := len(trainer.dataset.class_names)) > 1
            else "without classes"
        )
        + f", {trainer.config.run.precision} on {trainer.device}"
        + (f", {ranks.size} ranks by {config.run.parallel}" if ranks.size > 1 else "")
        + (", compiling in the first steps" if trainer.config.run.compile else ""),
        flush=True,
    )
    if arguments.resume is None:
        for line in trainer.initial:
            told(line, flush=True)
    if trainer.config.follows_the_clock:
        told("the learning rate depends on elapsed time (--minutes): a resumed run is not bit-reproducible")
    try:
        evaluate = ranks.together(lambda: _judge(trainer, out))
    except UserError:
        if made is not None:
            with contextlib.suppress(OSError):  # as one that is not empty raises
                os.removedirs(made)
        raise
    result = Run(trainer, out, True, evaluate).run()
    saved = checkpoint.step_folder(out, result.step)
    if result.interrupted:
        told(f"stopped at step {result.step}; checkpoint: {saved}")
        told(f"continue with: pmf train --resume {shlex.quote(str(out))}", file=sys.stderr)
        return INTERRUPTED
    told(f"trained {result.step} steps in {result.seconds / 60:.1f} minutes; checkpoint: {saved}")
    told(f"one-step samples: {result.picture}")
    return 0


def _judge(trainer: Trainer, out: Path) -> Judge | None:
    """The evaluator that --evaluate-every calls."""
    settings = trainer.config.evaluation
    if settings.evaluate_reference is None:
        return None
    shape = trainer.model.config.image_shape
    return Judge(
        settings.evaluate_reference,
        image_shape=(shape[0], shape[1], shape[2]),
        features=settings.evaluate_features,
        weights=None if settings.evaluate_weights is None else Path(settings.evaluate_weights),
        images=settings.evaluate_images,
        folder=out / "evaluation",
        device=trainer.device,
        batch_size=_JUDGED_AT_ONCE,
        ranks=trainer.ranks,
    )


def _say_nothing(*words: object, **how: object) -> None:
    """Print nothing, on every rank except the first."""


def _in_its_place(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that also switch off what they replace: steps the minutes, a schedule the cooldown."""
    replaced: dict[str, Any] = {}
    if settings.get("schedule", "constant") != "constant":
        replaced["cooldown"] = 0.0
    if settings.get("steps") is not None:
        replaced["minutes"] = None
    return replaced | settings


def _choose(arguments: argparse.Namespace, ranks: Ranks) -> tuple[Path | None, TrainConfig]:
    """The run folder, if known, and its settings."""
    flags = overrides = given_settings(arguments)
    preset, by_hand = None, {}
    if arguments.config is not None:
        if arguments.resume is not None:
            raise UserError("--resume uses the run's own settings: leave out --config")
        file = read_settings_file(arguments.config)
        preset, overrides = file.preset, _in_its_place(file.settings) | _in_its_place(flags)
        by_hand = file.settings if file.by_hand else {}
    if arguments.resume is not None:
        if arguments.preset is not None or arguments.out is not None:
            raise UserError("--resume uses the run's own folder and settings: leave out --preset and --out")
        if "init_from" in overrides:
            raise UserError("--resume continues from the run's own weights: leave out --init-from")
        config = resume_config(arguments.resume, _in_its_place(overrides))
        refuse_unread(config, overrides)
        if arguments.quick:
            done = checkpoint.step_of(checkpoint.newest_checkpoint(arguments.resume))
            config = config.with_settings(steps=done + 2, minutes=None)
        return arguments.resume, config
    overrides = _in_its_place(overrides)
    config, out = get_preset(arguments.preset or preset or "digits", **overrides), arguments.out
    refuse_unread(config, flags)
    refuse_unread(config, by_hand, replaced=flags)
    if arguments.quick:
        config = quick(config, ranks.size)
    if out is not None and any(place.is_file() for place in (out, *out.parents)):
        raise UserError(f"--out {out} is a file, or lies below one: give a folder")
    if out is not None and out.is_dir() and checkpoint.checkpoint_folders(out):
        quoted = shlex.quote(str(out))
        raise UserError(f"{out} already contains a run: use --resume {quoted}, or another --out")
    return out, config
