"""``pmf convert``: any checkpoint as one safetensors file of this project."""

import argparse
from pathlib import Path

from pmf import checkpoint, models
from pmf.atomic import write_file
from pmf.cli.arguments import Commands
from pmf.errors import UserError

_DESCRIPTION = """Write one safetensors file, which carries its model's configuration, from any checkpoint.

  pmf convert pMF-B-16.pth pmf-b-16.safetensors --preset pmf-b/16
  pmf convert runs/00000-digits digits.safetensors --ema 50

The authors' files are read without running any code they may hold; anything but tensors in them is an error.
"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser("convert", help="turn a checkpoint into one file", description=_DESCRIPTION)
    parser.add_argument("source", type=Path, help="a run's folder, .safetensors, or the authors' .pth")
    parser.add_argument("target", type=Path, help="the .safetensors file to write; it must not exist yet")
    parser.add_argument("--ema", help="which averaged weights of a run: a half-life such as 500, or none")
    parser.add_argument("--preset", choices=list(models.PRESETS), help="check that it is this model")
    parser.add_argument(
        "--noise-scale", type=float, help="standard deviation of the noise, for weights of no preset's shape"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Convert, and say what was found."""
    target: Path = arguments.target
    if target.suffix != ".safetensors":
        raise UserError(f"the target must end in .safetensors, got {target}")
    if target.exists():
        raise UserError(f"{target} exists: choose another name")
    loaded = checkpoint.load_model(arguments.source, arguments.ema, noise_scale=arguments.noise_scale)
    weights = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    if arguments.preset is not None:
        _require_preset(loaded, arguments.preset)
    try:
        write_file(target, checkpoint.weights_bytes(weights, loaded.model.config, loaded.class_names))
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    millions = sum(weight.numel() for weight in weights.values()) / 1e6
    print(f"{target}: {millions:.1f} M parameters from {loaded.path}")
    return 0


def _require_preset(loaded: checkpoint.LoadedModel, preset: str) -> None:
    expected = models.create_model(preset, num_classes=loaded.model.config.num_classes).config
    for name in ("image_size", "patch_size", "channels", "hidden_size", "depth", "head_depth", "num_heads"):
        found, wanted = getattr(loaded.model.config, name), getattr(expected, name)
        if found != wanted:
            raise UserError(f"{loaded.path} is not of {preset}: its {name} is {found}, not {wanted}")
