"""Digests that identify weights independently of their location."""

import hashlib
from pathlib import Path

import torch
from torch import nn

_CHUNK = 1 << 22  # bytes per read


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def weights_digest(module: nn.Module) -> str:
    """The SHA-256 of a network's tensors and their names, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
