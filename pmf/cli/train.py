"""``pmf train``: train a model, with a preset and overrides."""

import argparse
import json
import sys
from pathlib import Path

from pmf import checkpoint
from pmf.cli.arguments import Commands, add_settings, given_settings
from pmf.cli.settings_file import read_settings_file
from pmf.errors import UserError
from pmf.evaluation import Judge
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
    resume_config,
)

_INTERRUPTED = 130
_JUDGED_AT_ONCE = 64
_DESCRIPTION = """Train a model, and end with a picture of samples that took one network evaluation each.

Without arguments this trains on the handwritten digits of scikit-learn for a few minutes on a CPU. The run's
folder holds config.json, log.jsonl, loss.png, samples/*.png, samples.png and checkpoints/step-*.

  pmf train --minutes 10 --seed 1
  pmf train --preset pmf-b/16 --data photos --batch-size 64 --precision bf16 --out runs/photos
  pmf train --resume runs/photos --steps 500000
  torchrun --nproc-per-node 8 -m pmf train --preset pmf-b/16 --data 'shards/{000000..000063}.tar' \\
      --device cuda --parallel fsdp

Images: a folder with one subfolder per class; or with labels.csv, whose first row is file,label and every
other row an image and its class; or with dataset.json as the StyleGAN and EDM tools write it; or a folder
of WebDataset shards (.tar with <key>.jpg|png|... and <key>.cls), or of parquet files as Hugging Face writes
them (pip install pyarrow). Images without classes, such as a folder of nothing but images, train
unconditionally. Of parts beside each other (train, val, test) the first is read. All that Pillow opens is
taken, links are followed, and a note says what was left out. Images are cropped to their centre, turned as
EXIF says and never mirrored. Ctrl-C ends the step, saves a checkpoint and stops. A run goes on with any
number of ranks.
"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "train", help="train a model", usage="pmf train [--preset NAME] [options]", description=_DESCRIPTION
    )
    parser.add_argument(
        "--preset", choices=list(PRESETS), help="where settings that are not given come from (digits)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings from a run's config.json, or from YAML with the flags' names; flags win",
    )
    parser.add_argument("--out", type=Path, help="the run's folder (runs/<number>-<preset>)")
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="continue the newest checkpoint of this run's folder"
    )
    parser.add_argument("--dry-run", action="store_true", help="print all settings as JSON and stop")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two steps of a small network on few images (of a resumed run: two more), all else as asked",
    )
    add_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, and say where the results are."""
    with joined_ranks() as ranks:
        try:
            return _run(arguments, ranks)
        except UserError:
            if ranks.first:
                raise
            return 2  # every rank knows the sentence; one says it


def _run(arguments: argparse.Namespace, ranks: Ranks) -> int:
    out, config = ranks.together(lambda: _choose(arguments, ranks))
    if arguments.dry_run:
        if ranks.first:
            print(json.dumps(config.to_json(), indent=2))
        return 0
    trainer = prepare(config, resume_from=arguments.resume, ranks=ranks)
    if out is None:  # only now, so that settings or data that cannot be used leave no folder behind
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
        told("the learning rate follows the clock (--minutes): resumed, this run is not repeated bit for bit")
    evaluate = ranks.together(lambda: _judge(trainer, out))
    result = Run(trainer, out, True, evaluate).run()
    saved = checkpoint.step_folder(out, result.step)
    if result.interrupted:
        told(f"stopped at step {result.step}; checkpoint: {saved}")
        told(f"continue with: pmf train --resume {out}", file=sys.stderr)
        return _INTERRUPTED
    told(f"trained {result.step} steps in {result.seconds / 60:.1f} minutes; checkpoint: {saved}")
    told(f"one-step samples: {result.picture}")
    return 0


def _judge(trainer: Trainer, out: Path) -> Judge | None:
    """What --evaluate-every calls."""
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
    """What ranks but the first print."""


def _choose(arguments: argparse.Namespace, ranks: Ranks) -> tuple[Path | None, TrainConfig]:
    """The run's folder, if it is known, and its settings."""
    overrides = given_settings(arguments)
    preset = None
    if arguments.config is not None:
        if arguments.resume is not None:
            raise UserError("--resume takes the run's own settings: leave out --config")
        preset, written = read_settings_file(arguments.config)
        overrides = written | overrides
    if arguments.resume is not None:
        if arguments.preset is not None or arguments.out is not None:
            raise UserError("--resume takes the run's own folder and settings: leave out --preset and --out")
        if "init_from" in overrides:
            raise UserError("--resume continues from the run's own weights: leave out --init-from")
        config = resume_config(arguments.resume, overrides)
        if arguments.quick:
            done = checkpoint.step_of(checkpoint.newest_checkpoint(arguments.resume))
            config = config.with_settings(steps=done + 2, minutes=None)
        return arguments.resume, config
    try:
        config, out = get_preset(arguments.preset or preset or "digits", **overrides), arguments.out
    except TypeError as error:  # flags have their types; only a file can hold a word where a number belongs
        raise UserError(f"{arguments.config} holds a setting of a wrong type ({error})") from error
    if arguments.quick:
        config = quick(config, ranks.size)
    if out is not None and out.is_dir() and checkpoint.checkpoint_folders(out):
        raise UserError(f"{out} already holds a run: give --resume {out}, or another --out")
    return out, config
