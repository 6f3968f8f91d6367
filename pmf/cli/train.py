"""``pmf train``: train a model, with a preset and overrides."""

import argparse
import json
import sys
from pathlib import Path

from pmf import checkpoint
from pmf.cli.arguments import Commands, add_settings, given_settings
from pmf.errors import UserError
from pmf.training import PRESETS, Run, get_preset, new_run_folder, prepare, resume_config

_INTERRUPTED = 130
_DESCRIPTION = """Train a model, and end with a picture of samples that took one network evaluation each.

Without arguments this trains on the handwritten digits of scikit-learn for a few minutes on a CPU. The run's
folder holds config.json, log.jsonl, loss.png, samples/*.png, samples.png and checkpoints/step-*.

  pmf train --minutes 10 --seed 1
  pmf train --preset pmf-b/16 --data photos --batch-size 64 --precision bf16 --out runs/photos
  pmf train --resume runs/photos --steps 500000

Images: a folder with one subfolder per class; or a folder with labels.csv, whose first row is file,label and
every other row an image and its class; or with dataset.json as the StyleGAN and EDM tools write it. Images
are cropped to their centre square and never mirrored. Ctrl-C ends the step, saves a checkpoint and stops.
"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "train", help="train a model", usage="pmf train [--preset NAME] [options]", description=_DESCRIPTION
    )
    parser.add_argument(
        "--preset", choices=list(PRESETS), help="where settings that are not given come from (digits)"
    )
    parser.add_argument("--out", type=Path, help="the run's folder (runs/<number>-<preset>)")
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="continue the newest checkpoint of this run's folder"
    )
    parser.add_argument("--dry-run", action="store_true", help="print all settings as JSON and stop")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, and say where the results are."""
    overrides = given_settings(arguments)
    if arguments.resume is not None:
        if arguments.preset is not None or arguments.out is not None:
            raise UserError("--resume takes the run's own folder and settings: leave out --preset and --out")
        out = arguments.resume
        config = resume_config(out, overrides)
    else:
        config = get_preset(arguments.preset or "digits", **overrides)
        out = arguments.out
        if out is not None and out.is_dir() and checkpoint.checkpoint_folders(out):
            raise UserError(f"{out} already holds a run: give --resume {out}, or another --out")
    if arguments.dry_run:
        print(json.dumps(config.to_json(), indent=2))
        return 0
    trainer = prepare(config, resume_from=arguments.resume)
    if out is None:  # only now, so that settings or data that cannot be used leave no folder behind
        out = new_run_folder(Path("runs"), config.preset)
    millions = sum(weight.numel() for weight in trainer.weights().values()) / 1e6
    print(
        f"{out}: {millions:.1f} M parameters, {len(trainer.dataset)} images in "
        f"{len(trainer.dataset.class_names)} classes, {trainer.config.run.precision} on {trainer.device}"
        + (", compiling in the first steps" if trainer.config.run.compile else ""),
        flush=True,
    )
    result = Run(trainer, out, progress=True).run()
    saved = checkpoint.newest_checkpoint(out)
    if result.interrupted:
        print(f"stopped at step {result.step}; checkpoint: {saved}")
        print(f"continue with: pmf train --resume {out}", file=sys.stderr)
        return _INTERRUPTED
    print(f"trained {result.step} steps in {result.seconds / 60:.1f} minutes; checkpoint: {saved}")
    print(f"one-step samples: {result.picture}")
    return 0
