"""``pmf convert``: write any checkpoint as a single file, in our format or with the authors' names."""

import argparse
import io
from pathlib import Path

import torch

from pmf import checkpoint, models
from pmf.atomic import write_file
from pmf.cli.arguments import Commands
from pmf.errors import UserError
from pmf.official import to_official
from pmf.sizes import size_in_words

_SUFFIXES = (".safetensors", ".pth", ".pt")

_DESCRIPTION = """Write a checkpoint as one file: .safetensors, which includes the model configuration, or
.pth with the parameter names of the authors' PyTorch code, which stores no configuration.

  pmf convert pMF-B-16.pth pmf-b-16.safetensors --preset pmf-b/16
  pmf convert runs/00000-digits digits.safetensors --ema 10 --for-sampling
  pmf convert runs/imagenet pMF-B-16.pth

The authors' files are read without executing code they may contain; anything but tensors is an error.
"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser("convert", help="convert a checkpoint to one file", description=_DESCRIPTION)
    parser.add_argument(
        "source",
        type=Path,
        help="run or checkpoint folder, .safetensors, the authors' .pth, or digits, which is built in",
    )
    parser.add_argument(
        "target", type=Path, help="the .safetensors or .pth file to write; must not exist yet"
    )
    parser.add_argument("--ema", help="averaged weights to use: a half-life such as 500, or none")
    parser.add_argument("--preset", choices=list(models.CONFIGS), help="check that the model is this preset")
    parser.add_argument(
        "--noise-scale", type=float, help="standard deviation of the noise, if the model matches no preset"
    )
    parser.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="file with one class name per line for pmf sample --classes; .safetensors only",
    )
    parser.add_argument(
        "--for-sampling",
        action="store_true",
        help="less than half the size: weights in float16, without the head that only training needs; "
        ".safetensors only",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Convert, and report what was written."""
    target: Path = arguments.target
    if target.suffix not in _SUFFIXES:
        raise UserError(
            f"the target must end in .safetensors, or in .pth for the authors' names, got {target}"
        )
    if target.exists():
        raise UserError(f"{target} already exists: choose another name")
    if arguments.class_names is not None and target.suffix != ".safetensors":
        raise UserError("--class-names are stored in .safetensors only: leave them out")
    for_sampling: bool = arguments.for_sampling
    if for_sampling and target.suffix != ".safetensors":
        raise UserError(
            "--for-sampling writes .safetensors only, because the authors' code needs every weight"
        )
    loaded = checkpoint.load_model(
        arguments.source, arguments.ema, noise_scale=arguments.noise_scale, v_head=not for_sampling
    )
    weights = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    if for_sampling:
        weights = {name: weight.half() for name, weight in weights.items()}
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise UserError(f"{name} of {loaded.path} does not fit float16: leave out --for-sampling")
    if arguments.preset is not None:
        _require_preset(loaded, arguments.preset)
    names, config = loaded.class_names, loaded.model.config
    if arguments.class_names is not None:
        names = _read_names(arguments.class_names, config.num_classes)
    if target.suffix == ".safetensors":
        content = checkpoint.weights_bytes(weights, config, names)
    else:
        content = _official_bytes(loaded.model)
    try:
        write_file(target, content)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    millions = sum(weight.numel() for weight in weights.values()) / 1e6
    print(f"{target}: {millions:.1f} M parameters from {loaded.path}")
    if target.suffix != ".safetensors":
        print(f"not stored in a .pth file: class names, {_settings(config)}")
    return 0


def _settings(config: models.ModelConfig) -> str:
    low, high = config.sample_interval
    return f"noise scale {config.noise_scale:g}, omega {config.sample_omega:g}, interval {low:g} to {high:g}"


def _official_bytes(model: models.PixelMeanFlow) -> bytes:
    config = model.config
    if not isinstance(config.image_size, int):
        raise UserError(
            f"the authors' code would take this model's {size_in_words(config.image_size)} images for "
            "squares: write a .safetensors file"
        )
    if config.prediction != "x" or config.preconditioner != "none":
        raise UserError(
            f"the authors' code would misread this model (prediction {config.prediction}, preconditioner "
            f"{config.preconditioner}): write a .safetensors file"
        )
    content = io.BytesIO()
    torch.save(to_official(dict(model.state_dict())), content)
    return content.getvalue()


def _read_names(path: Path, count: int) -> list[str]:
    """Read one class name per line, in label order."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows begins it with a mark
        names = [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--class-names {path} cannot be read as text ({error})") from error
    if len(names) != count or len(set(names)) != count:
        raise UserError(
            f"--class-names {path} has {len(set(names))} different names, but the model has {count} classes: "
            "give one name per line"
        )
    return names


def _require_preset(loaded: checkpoint.LoadedModel, preset: str) -> None:
    expected = models.create_model(preset, num_classes=loaded.model.config.num_classes).config
    for name in ("image_size", "patch_size", "channels", "hidden_size", "depth", "head_depth", "num_heads"):
        found, wanted = getattr(loaded.model.config, name), getattr(expected, name)
        if found != wanted:
            raise UserError(f"{loaded.path} does not match {preset}: its {name} is {found}, not {wanted}")
