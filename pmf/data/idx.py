"""Datasets in MNIST's file format, such as Fashion-MNIST: ``train-images-idx3-ubyte`` and its labels.

On Debian and Ubuntu, ``apt install dataset-fashion-mnist`` installs Fashion-MNIST in
``/usr/share/datasets/fashion-mnist``, which ``pmf train --data`` reads directly.
"""

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from pmf.errors import UserError

_IMAGES, _LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
_UINT8 = 0x08


def is_idx_folder(root: Path) -> bool:
    """Whether the folder contains training images in this format, plain or compressed."""
    return any((root / (_IMAGES + end)).is_file() for end in ("", ".gz"))


def read_idx_folder(root: Path) -> tuple[Tensor, Tensor]:
    """The training set: uint8 images [N, 1, H, W] and int64 labels [N]; UserError for damaged files."""
    images, labels = _read(root, _IMAGES, 3), _read(root, _LABELS, 1)
    if len(images) != len(labels) or len(images) == 0:
        raise UserError(
            f"{root} contains {len(images)} images and {len(labels)} labels: copy its files again"
        )
    return images[:, None], labels.long()


def _read(root: Path, name: str, dimensions: int) -> Tensor:
    """Read a file: 0, 0, the type, the number of dimensions, each size in four bytes, then the data."""
    path = root / (name + ".gz")
    path = path if path.is_file() else root / name
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from error
    start = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if content[:4] != bytes([0, 0, _UINT8, dimensions]) or len(content) != start + math.prod(sizes):
        raise UserError(
            f"{path} is truncated, or not a file of {dimensions}-dimensional bytes: copy it again"
        )
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(sizes)
