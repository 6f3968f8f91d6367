"""The feature sums of an evaluation, in memory and on disk."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmf import checkpoint
from pmf.atomic import write_file
from pmf.errors import UserError
from pmf.metrics import InceptionScore, Moments

__all__ = ["Sums"]

_SPLITS = 10  # Inception Score is the mean over this many splits of the images


class Sums:
    """Sums of image features and, if the space has logits, of class probabilities.

    done [batches] marks the batches included. Sums over disjoint batches can be added.
    """

    def __init__(
        self, images: int, batches: int, width: int, classes: int | None, device: torch.device | str
    ) -> None:
        self.done = torch.zeros(batches, dtype=torch.bool, device="cpu")
        self.moments = Moments(width, device)
        self.score = None
        if classes is not None:
            self.score = InceptionScore(images, classes, min(_SPLITS, images), device)
        self._whole = True

    def add(self, batch: int, indices: Tensor, features: Tensor, logits: Tensor | None) -> None:
        """Add one batch."""
        self._whole = False  # Ctrl-C below leaves partial sums that must not be saved
        self.moments.add(features)
        if self.score is not None and logits is not None:
            self.score.add(logits, indices)
        self.done[batch] = True
        self._whole = True

    def tensors(self) -> dict[str, Tensor]:
        """All sums by name, except `done`."""
        named = {f"moments.{name}": tensor for name, tensor in self.moments.tensors().items()}
        if self.score is not None:
            named |= {f"score.{name}": tensor for name, tensor in self.score.tensors().items()}
        return named

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Replace the file; a no-op if a batch was only partly added."""
        if not self._whole:
            return
        tensors = {name: tensor.cpu() for name, tensor in self.tensors().items()} | {"done": self.done}
        try:
            write_file(path, checkpoint.tensors_bytes(tensors, {"evaluation": identity}))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error

    def add_file(self, path: Path, identity: dict[str, Any]) -> None:
        """Add the sums in a file unless they are already included.

        Raises UserError naming the difference if they belong to another evaluation.
        """
        tensors, header = checkpoint.read_tensors(path)
        found, wanted = header.get("evaluation"), json.loads(json.dumps(identity))
        if found != wanted:
            raise UserError(
                f"{path} belongs to another evaluation ({_difference(found, wanted)}): give another --out, "
                "or remove the file"
            )
        mine = self.tensors()
        if {name: x.shape for name, x in tensors.items()} != {
            name: x.shape for name, x in (mine | {"done": self.done}).items()
        }:
            raise UserError(f"{path} does not contain the sums of this evaluation: remove it")
        done = tensors["done"]
        if (done & self.done).any():
            if not (done & ~self.done).any():  # already merged into the main file
                return
            raise UserError(f"{path} contains images already counted in another file: remove it")
        for name, tensor in mine.items():
            tensor += tensors[name].to(tensor.device)
        self.done |= done


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    """The first setting in which two identities, as JSON gives them back, differ."""
    if not isinstance(found, dict):
        return "it does not say which"
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            return _difference(old, new)
        if old != new:
            return f"its {name} is {old}, now it is {new}"
    raise AssertionError("the identities are equal")
