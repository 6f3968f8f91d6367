"""Weights to start from: those of another run, or the authors'."""

from pathlib import Path

import torch

from pmf import checkpoint, models
from pmf.errors import UserError
from pmf.wrappers import by_plain_names

_SHOWN = 8  # names of a list in full


def initialise(model: models.PixelMeanFlow, source: Path) -> list[str]:
    """Copy what fits from a checkpoint into a model whose other weights keep their random draw.

    source: as for `pmf.load_checkpoint`; of a run, the averaged weights that it samples from. A weight comes
    along if the model has one of the same name and shape: other classes change the label table, other sizes
    the positions, other patches the embedding and the last layers.

    Returns lines that say what came along and what is new. Raises UserError where the file is missing or
    damaged, and where nothing fits.
    """
    given = _read(source)
    parameters = dict(model.named_parameters())
    fitting = [name for name, p in parameters.items() if name in given and given[name].shape == p.shape]
    if not fitting:
        raise UserError(f"--init-from {source}: no weight has a name and shape of this model's: give another")
    with torch.no_grad():
        for name in fitting:
            parameters[name].copy_(given[name])
    lines = [f"{len(fitting)} of {len(parameters)} weights come from {source}"]
    for name, p in parameters.items():
        if name in given and given[name].shape != p.shape:
            lines.append(f"drawn new: {name}, {_size(p)} here and {_size(given[name])} there")
    for what, names in (
        ("drawn new, not there", [name for name in parameters if name not in given]),
        ("left out, not in this model", [name for name in given if name not in parameters]),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{what}: {', '.join(names[:_SHOWN])}{more}")
    return lines


def _read(source: Path) -> dict[str, torch.Tensor]:
    if source.is_dir() or source.suffix == ".safetensors":
        return dict(checkpoint.load_model(source).model.named_parameters())
    try:  # without building its model, whose noise scale a state dict may not tell
        return models.from_official(by_plain_names(checkpoint.read_official(source)))
    except ValueError as error:
        raise UserError(f"{source} does not hold a pixel MeanFlow model: {error}") from error


def _size(x: torch.Tensor) -> str:
    return " x ".join(map(str, x.shape))
