"""Initial weights from another run or from the authors' checkpoint."""

from pathlib import Path

import torch

from pmf import checkpoint, models
from pmf.errors import UserError
from pmf.wrappers import by_plain_names

_SHOWN = 8  # names listed in full


def initialise(model: models.PixelMeanFlow, source: Path) -> list[str]:
    """Copy the weights that fit from a checkpoint; the others keep their random initialisation.

    source: as for `pmf.load_checkpoint`; for a run, the weight average it samples from. A weight is copied if
    the model has one of the same name and shape: a different set of classes changes the label table, a
    different size the positions, a different patch size the embedding and the final layers.

    Returns lines that report what was copied and what is new. Raises UserError if the file is missing or
    damaged or nothing fits.
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
            lines.append(
                f"initialised randomly: {name}, {_size(p)} here and {_size(given[name])} in the file"
            )
    for what, names in (
        ("initialised randomly, not in the file", [name for name in parameters if name not in given]),
        ("ignored, not in this model", [name for name in given if name not in parameters]),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{what}: {', '.join(names[:_SHOWN])}{more}")
    return lines


def _read(source: Path) -> dict[str, torch.Tensor]:
    if source.is_dir() or source.suffix == ".safetensors" or str(source) in checkpoint.BUILT_IN:
        return dict(checkpoint.load_model(source).model.named_parameters())
    try:  # without building its model: a state dict may not determine the noise scale
        return models.from_official(by_plain_names(checkpoint.read_official(source)))
    except ValueError as error:
        raise UserError(f"{source} does not hold a pixel MeanFlow model: {error}") from error


def _size(x: torch.Tensor) -> str:
    return " x ".join(map(str, x.shape))
