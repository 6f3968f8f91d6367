"""Reference statistics files: the mean and covariance of features, as .npz."""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pmf.atomic import write_file
from pmf.errors import UserError
from pmf.evaluation.features import FeatureSpace

__all__ = ["Statistics", "read_statistics", "write_statistics"]

_NAMES = (("mu", "sigma"), ("ref_mu", "ref_sigma"), ("m", "s"), ("mean", "cov"))
"""Written by pytorch-fid, EDM and ADM; the MeanFlow and JiT trainers; TTUR variants; others."""


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] in float64."""

    mean: Tensor
    covariance: Tensor


def read_statistics(path: Path, space: FeatureSpace) -> Statistics | None:
    """Read statistics from a .npz file; None if it contains images (``arr_0``, ADM's batches) instead.

    Accepted names: mu and sigma, ref_mu and ref_sigma, m and s, mean and cov. Raises UserError if the file is
    missing, damaged, has the wrong size or names another feature space, or weights or a size of its images
    that differ.
    """
    path = Path(os.path.expanduser(path))  # as for images
    if not path.is_file():
        raise UserError(f"there is no reference statistics file {path}")
    try:
        arrays = _load(path, [*(name for pair in _NAMES for name in pair), "features", "identity"])
    except MemoryError:
        raise
    except Exception as error:  # of any kind: zipfile, zlib and NumPy read a damaged file as it comes
        raise UserError(f"{path} is truncated or not an .npz file ({error}): copy it again") from error
    pair = next((pair for pair in _NAMES if set(pair) <= arrays.keys()), None)
    if pair is None and "arr_0" in arrays:
        return None
    if pair is None:
        raise UserError(
            f"{path} contains {', '.join(arrays) or 'nothing'}, but neither mu and sigma nor images in "
            "arr_0: make statistics with pmf evaluate --images FOLDER --make-stats FILE.npz"
        )
    mean, covariance = (np.asarray(arrays[name], dtype=np.float64) for name in pair)
    features = str(arrays.get("features", space.name))
    if features != space.name:
        raise UserError(
            f"{path} contains statistics of the features {features!r}, not {space.name!r}: give --features "
            f"{features}, or other statistics"
        )
    if mean.shape != (space.width,) or covariance.shape != (space.width, space.width):
        raise UserError(
            f"{path} contains {pair[0]} {list(mean.shape)} and {pair[1]} {list(covariance.shape)}, but the "
            f"features {space.name!r} of these images have {space.width} dimensions: give statistics of the "
            "same features and image size"
        )
    identity = json.dumps(space.identity(), sort_keys=True)
    if str(arrays.get("identity", identity)) != identity:
        raise UserError(
            f"{path} contains statistics of the features {arrays['identity']}, here they are {identity}: "
            "make the statistics again, with the same weights and size of images"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path} contains non-finite numbers: make the statistics again")
    return Statistics(torch.from_numpy(mean), torch.from_numpy(covariance))


def _load(path: Path, wanted: Sequence[str]) -> dict[str, np.ndarray | None]:
    """The arrays of a .npz file by name; None for those not wanted, which may be large."""
    with path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it contains a single array")
        return {name: loaded[name] if name in wanted else None for name in loaded.files}


def write_statistics(path: Path, statistics: Statistics, space: FeatureSpace, images: int) -> None:
    """Write mu and sigma, which other tools read, plus the exact feature space and the number of images."""
    content = io.BytesIO()
    np.savez(
        content,
        mu=statistics.mean.numpy(),
        sigma=statistics.covariance.numpy(),
        features=np.array(space.name),
        identity=np.array(json.dumps(space.identity(), sort_keys=True)),
        images=np.array(images),
    )
    write_file(path, content.getvalue())
