"""Initial weights from another run or from the authors' checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import torch

from pmf import checkpoint, models
from pmf.data.labels import UNLABELLED
from pmf.errors import UserError, first_few

_SHOWN = 8  # names listed in full
_TABLE = "condition.label_embedder.embedding.weight"


def initialise(model: models.PixelMeanFlow, source: Path, class_names: Sequence[str]) -> list[str]:
    """Copy the weights that fit from a checkpoint; the others keep their random initialisation.

    source: as for `pmf.load_checkpoint`; for a run, the weight average it samples from. A weight is copied if
    the model has one of the same name and shape: a different size changes the positions, a different patch
    size the embedding and the final layers. Of the label table, the rows of classes with the same name are
    copied, and the row for "no label". Classes of the authors' files are named by their numbers.

    Returns lines that report what was copied and what is new. Raises UserError if the file is missing or
    damaged or nothing fits.
    """
    given, trained_names = _read(source)
    parameters = dict(model.named_parameters())
    rows = _rows_by_name(class_names, trained_names)
    fitting = [name for name, p in parameters.items() if _fits(name, p, given)]
    if not fitting:
        raise UserError(
            f"--init-from {source}: no weight matches this model's names and shapes: give another"
        )
    with torch.no_grad():
        for name in fitting:
            if name == _TABLE:
                here, there = (list(numbers) for numbers in zip(*rows, strict=True))
                parameters[name][here] = given[name][there].to(parameters[name])
            else:
                parameters[name].copy_(given[name])
    lines = [f"{len(fitting)} of {len(parameters)} weights come from {source}"]
    if _TABLE in fitting:
        lines += _report_classes(class_names, trained_names, rows)
    for name, p in parameters.items():
        if name in given and name not in fitting:
            lines.append(
                f"initialised randomly: {name}, {_size(p)} here and {_size(given[name])} in the file"
            )
    for what, names in (
        ("initialised randomly, not in the file", [name for name in parameters if name not in given]),
        ("ignored, not in this model", [name for name in given if name not in parameters]),
    ):
        if names:
            lines.append(f"{what}: {first_few(names, _SHOWN)}")
    return lines


def _fits(name: str, parameter: torch.Tensor, given: dict[str, torch.Tensor]) -> bool:
    """Whether a weight, or rows of the label table, can be copied."""
    rows = 1 if name == _TABLE else 0
    return name in given and given[name].shape[rows:] == parameter.shape[rows:]


def _rows_by_name(here: Sequence[str], there: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of rows of two label tables, here and there, with one meaning: a class, or last, "no label".

    Images without classes have one class, which means "no label" to a network that knows classes.
    """
    none = len(here), len(there)
    if (list(here) == [UNLABELLED]) != (list(there) == [UNLABELLED]):
        return [(0, len(there)), none] if list(here) == [UNLABELLED] else [none]
    place = {name: row for row, name in enumerate(there)}
    return [*((row, place[name]) for row, name in enumerate(here) if name in place), none]


def _report_classes(here: Sequence[str], there: Sequence[str], rows: list[tuple[int, int]]) -> list[str]:
    """Lines about the classes that only one side has."""
    copied, used = ({pair[side] for pair in rows} for side in (0, 1))
    new = [name for row, name in enumerate(here) if row not in copied]
    unused = [name for row, name in enumerate(there) if row not in used and list(there) != [UNLABELLED]]
    lines = []
    if new:
        lines.append(
            f"initialised randomly: {len(new)} of {len(here)} classes, not in the file: "
            + first_few(new, _SHOWN)
        )
    if unused:
        lines.append(
            f"ignored: {len(unused)} of the file's classes, not in the data: {first_few(unused, _SHOWN)}"
        )
    return lines


def _read(source: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights by name, and the class names."""
    if source.is_dir() or source.suffix == ".safetensors" or str(source) in checkpoint.BUILT_IN:
        loaded = checkpoint.load_model(source)
        return dict(loaded.model.named_parameters()), loaded.class_names
    weights = checkpoint.official_weights(source)  # a state dict may not determine the noise scale
    classes = max(len(weights[_TABLE]) - 1, 0) if _TABLE in weights else 0
    return weights, [str(number) for number in range(classes)]


def _size(x: torch.Tensor) -> str:
    return " x ".join(map(str, x.shape))
