"""Images to evaluate: from a model, a folder, an array in a file, or a dataset."""

import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from pmf.data import load_dataset, read_image
from pmf.data.finding import find_images
from pmf.data.idx import is_idx_folder
from pmf.data.images import Encoded, image_size
from pmf.data.shards import Stored
from pmf.errors import UserError
from pmf.flow.sampler import Sampler, sampling_times
from pmf.pictures import save_png, to_uint8
from pmf.sampling import draw_by_seed
from pmf.sizes import Size, height_and_width, size_in_words

__all__ = ["ImageSource", "Samples", "Some", "open_images"]

_WORKERS = 8  # threads for reading and writing image files
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: lengths of its name and extra field


class ImageSource(Protocol):
    """Images by index, reproducible on every access."""

    shape: tuple[int, int, int]

    @property
    def from_files(self) -> bool:
        """Whether reading waits for a disk, so that prefetching pays off."""
        ...

    def __len__(self) -> int: ...

    def identity(self) -> dict[str, Any]:
        """What determines the images, for the record and to recognise an interrupted evaluation."""
        ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W]."""
        ...


@dataclass
class Samples:
    """Class-balanced samples from a model: image i has class classes[i mod their number] and seed + i."""

    sampler: Sampler
    model: dict[str, Any]
    """Identifies the weights."""
    classes: list[int]
    count: int
    seed: int = 0
    steps: int = 1
    times: list[float] | None = None
    omega: float | None = None
    interval: tuple[float, float] | None = None
    from_files: ClassVar[bool] = False
    keep: Path | None = None
    """Where to save every image, in a folder per class that pmf train can read; None saves none."""

    def __post_init__(self) -> None:
        self.shape = self.sampler.network.config.image_shape

    def __len__(self) -> int:
        return self.count

    def identity(self) -> dict[str, Any]:
        config = self.sampler.network.config
        return {
            **self.model,
            "images": self.count,
            "classes": "all" if self.classes == list(range(config.num_classes)) else self.classes,
            "seed": self.seed,
            "times": sampling_times(self.steps, self.times),
            "omega": config.sample_omega if self.omega is None else self.omega,
            "interval": list(config.sample_interval if self.interval is None else self.interval),
            "precision": self.sampler.precision,
            "keep": None if self.keep is None else str(self.keep),
        }

    def read(self, indices: Sequence[int]) -> Tensor:
        labels = [self.classes[i % len(self.classes)] for i in indices]
        images = draw_by_seed(
            self.sampler,
            labels,
            [self.seed + i for i in indices],
            steps=self.steps,
            times=self.times,
            omega=self.omega,
            interval=self.interval,
        )
        pixels = to_uint8(images)
        if self.keep is not None:
            self._save(self.keep, pixels.cpu(), labels, indices)
        return pixels

    def _save(self, folder: Path, pixels: Tensor, labels: list[int], indices: Sequence[int]) -> None:
        def save(image: Tensor, label: int, index: int) -> None:
            save_png(image, folder / f"{label:04d}" / f"{index:08d}.png")

        try:
            with ThreadPoolExecutor(_WORKERS) as threads:
                list(threads.map(save, pixels, labels, indices))
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


class Some:
    """A number of images from a source, evenly spaced, so that sorted classes are represented equally."""

    def __init__(self, source: ImageSource, count: int) -> None:
        if not 0 < count <= len(source):
            raise UserError(f"--num-images must be at most the {len(source)} available images, got {count}")
        self.source, self.count = source, count
        self.shape, self.from_files = source.shape, source.from_files

    def __len__(self) -> int:
        return self.count

    def identity(self) -> dict[str, Any]:
        return {**self.source.identity(), "images": self.count, "of": len(self.source)}

    def read(self, indices: Sequence[int]) -> Tensor:
        return self.source.read([i * len(self.source) // self.count for i in indices])


def open_images(source: str, *, channels: int | None = None, size: Size | None = None) -> ImageSource:
    """Open a folder of images (at any depth), a .npz file (``arr_0``), or a dataset that `pmf train` accepts.

    channels: 1 for greyscale, 3 for colour (the default for files). size: centre-crop files to this size, a
    number or (height, width); without it all must have the same size. Raises UserError if there are no such
    images.
    """
    if not source:
        raise UserError("the path of the images is empty: give a folder, a .npz file of images, or digits")
    source = os.path.expanduser(source)  # as in `find_images`
    path = Path(source)
    if path.suffix == ".npz":
        return _Array(path, channels, size)
    if source == "digits":
        return _DataSet(source, channels or 1, size or 8)
    if is_idx_folder(path):
        if size is None:
            raise UserError(f"{source} contains a dataset rather than image files: give its --image-size")
        return _DataSet(source, channels or 1, size)
    if not path.exists() and not source.lower().endswith(".tar"):  # a shard pattern
        raise UserError(f"there are no images {source}: give a folder, a .npz file of images, or digits")
    return _Files(source, find_images(source).images, channels or 3, size)


class _Files:
    """Image files, or encoded images within larger files, decoded on several threads."""

    from_files = True

    def __init__(self, root: str, paths: Sequence[Encoded], channels: int, size: Size | None) -> None:
        self.root, self.paths, self.exact = root, paths, size is None
        self.size = image_size(paths[0]) if size is None else height_and_width(size)  # see `read`
        self.shape = (channels, *self.size)
        self._threads = ThreadPoolExecutor(_WORKERS, thread_name_prefix="pmf-read")

    def __len__(self) -> int:
        return len(self.paths)

    def identity(self) -> dict[str, Any]:
        digest = 0
        for path in self.paths:
            if isinstance(path, Stored):
                about = f"{path.name} {path.length}"
            else:
                about = f"{os.path.relpath(path, self.root)} {os.stat(path).st_size}"
            digest = zlib.crc32(os.fsencode(about + "\n"), digest)
        return {
            "source": self.root,
            "images": len(self),
            "files": f"{digest:08x}",
            "shape": list(self.shape),
        }

    def read(self, indices: Sequence[int]) -> Tensor:
        return torch.stack(list(self._threads.map(self._read, (self.paths[i] for i in indices))))

    def _read(self, path: Encoded) -> Tensor:
        if self.exact and image_size(path) != self.size:
            raise UserError(
                f"{path} is not {size_in_words(self.size)} pixels as {self.paths[0]} is: give --image-size "
                "to crop all images to one size"
            )
        return read_image(path, self.size, self.shape[0])


class _Array:
    """``arr_0`` of a .npz file, uint8 [N, H, W, C]: memory-mapped unless it is compressed."""

    from_files = True

    def __init__(self, path: Path, channels: int | None, size: Size | None) -> None:
        self.path = path
        try:
            self.pixels, self.checksum = _map_member(path, "arr_0")
        except MemoryError:
            raise
        except Exception as error:  # of any kind: zipfile, zlib and NumPy read a damaged file as it comes
            raise UserError(f"{path} contains no image array arr_0 ({error}): copy it again") from error
        found = self.pixels.shape
        if self.pixels.dtype != np.uint8 or len(found) != 4 or found[3] not in (1, 3):
            raise UserError(
                f"{path} contains {self.pixels.dtype} {list(found)}: "
                "images must be uint8 [N, height, width, 1 or 3]"
            )
        self.shape = (found[3], found[1], found[2])
        wanted = (channels or self.shape[0], *height_and_width(size or self.shape[1:]))
        if wanted != self.shape:
            raise UserError(
                f"{path} contains images {list(self.shape)} (channels, height, width), but {list(wanted)} "
                "are needed: arrays are not resized"
            )

    def __len__(self) -> int:
        return len(self.pixels)

    def identity(self) -> dict[str, Any]:
        about = {"images": len(self), "checksum": f"{self.checksum:08x}", "shape": list(self.shape)}
        return {"source": str(self.path), **about}

    def read(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.array(self.pixels[list(indices)])).permute(0, 3, 1, 2)


def _map_member(path: Path, name: str) -> tuple[np.ndarray, int]:
    """An array in a .npz file, memory-mapped if it is stored uncompressed, and the checksum noted there."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return np.load(path, allow_pickle=False)[name], member.CRC
        file.seek(member.header_offset)
        lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        file.seek(sum(lengths), 1)
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, is_fortran, dtype = read_header[version](file)
        if is_fortran or dtype.hasobject:
            return np.load(path, allow_pickle=False)[name], member.CRC
        return np.memmap(path, dtype, "r", file.tell(), shape), member.CRC


class _DataSet:
    """A dataset that pmf train accepts."""

    def __init__(self, name: str, channels: int, size: Size) -> None:
        self.name, self.data = name, load_dataset(name, size, channels)
        self.shape, self.from_files = (channels, *height_and_width(size)), not self.data.in_memory

    def __len__(self) -> int:
        return len(self.data)

    def identity(self) -> dict[str, Any]:
        about = {"images": len(self), "shape": list(self.shape)}
        return {"source": self.name, **about, "checksum": getattr(self.data, "fingerprint", None)}

    def read(self, indices: Sequence[int]) -> Tensor:
        return to_uint8(self.data.get(indices)[0])
