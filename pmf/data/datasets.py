"""Datasets: images by index, in memory or read from files."""

import logging
import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch

from pmf.data.digits import load_digits
from pmf.data.finding import FoundImages, class_names, find_images
from pmf.data.idx import is_idx_folder, read_idx_folder
from pmf.data.images import Encoded, check_image, read_image, to_float
from pmf.data.memory import MemoryImages
from pmf.data.shards import Stored
from pmf.errors import UserError
from pmf.sizes import Size, height_and_width, size_in_words

_CACHE_BYTES = 1 << 30  # image sets whose cropped pixels fit in this are decoded once and kept in memory
_QUEUED = 4096  # images queued for decoding: queueing millions would take gigabytes
_log = logging.getLogger(__name__)
_COLOURS = {1: "greyscale", 3: "colour"}
_READERS = 8  # decoding threads; Pillow releases the GIL while decoding


class ImageDataset(Protocol):
    """The interface of a training dataset."""

    class_names: list[str]
    in_memory: bool

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [B, C, H, W] as stored, uint8 or float32 in [-1, 1], and labels [B] int64."""
        ...

    def get(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images converted to float32 in [-1, 1], and labels."""
        ...


class FolderImages:
    """Images in files, or in larger files, read and decoded on threads on every access."""

    in_memory = False

    def __init__(
        self,
        paths: Sequence[Encoded],
        labels: Sequence[int],
        class_names: list[str],
        size: Size,
        channels: int,
        fingerprint: str | None = None,
    ) -> None:
        self.paths, self.labels, self.fingerprint = paths, torch.tensor(labels), fingerprint
        self.class_names, self.size, self.channels = class_names, size, channels
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="pmf-read")

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.read_pixels(indices), self.labels[torch.as_tensor(indices)]

    def get(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, labels = self.read(indices)
        return to_float(pixels), labels

    def read_pixels(self, indices: Iterable[int]) -> torch.Tensor:
        """uint8 [B, C, H, W]; raises UserError for the first unreadable file."""
        indices = list(indices)
        pixels = torch.empty((len(indices), self.channels, *height_and_width(self.size)), dtype=torch.uint8)
        rows = enumerate(indices)

        def read(place: int, index: int) -> None:
            pixels[place] = read_image(self.paths[index], self.size, self.channels)

        while some := list(islice(rows, _QUEUED)):
            list(self._readers.map(read, *zip(*some, strict=True)))
        return pixels

    def check_headers(self) -> None:
        """Open every file without decoding it, so that a bad file is found before training starts."""
        paths = iter(self.paths)
        while some := list(islice(paths, _QUEUED)):
            list(self._readers.map(lambda path: check_image(path, self.size), some))


def load_dataset(source: str | os.PathLike[str], image_size: Size, channels: int) -> ImageDataset:
    """Load ``digits``, or images from files.

    Accepts a folder of images (layouts: pmf/data/labels.py), of MNIST-format files, of WebDataset shards (or
    a shard pattern, pmf/data/shards.py) or of parquet files (pmf/data/parquet.py). Images without classes
    form a single class. Skipped files, such as a test split, are logged in a one-line warning. image_size: a
    number for squares, or (height, width). Raises UserError if there are no images, or a file is damaged, not
    an image, or too small. Up to 1 GiB of cropped pixels is decoded at once and kept in memory.
    """
    source = os.path.expanduser(os.fspath(source))
    height, width = height_and_width(image_size)
    if channels not in _COLOURS:
        raise UserError(f"--channels must be 1 (greyscale) or 3 (colour), got {channels}")
    if source == "digits":
        if (height, width, channels) != (8, 8, 1):
            raise UserError(
                f"the digits are 8x8 greyscale images, but {height}x{width} {_COLOURS[channels]} images were "
                "requested: use --image-size 8 --channels 1, or give an image folder with --data"
            )
        if os.path.isdir(source):
            _log.warning("digits are those of scikit-learn: the folder of that name is ./digits")
        return load_digits()
    if is_idx_folder(Path(source)):
        images, labels = read_idx_folder(Path(source))
        found = images.shape[2:]
        if tuple(images.shape[1:]) != (channels, height, width):
            raise UserError(
                f"the images of {source} are {size_in_words(found)} greyscale, but {height}x{width} "
                f"{_COLOURS[channels]} images were requested: use --image-size {size_in_words(found)} "
                "--channels 1"
            )
        checksum = zlib.crc32(labels.numpy().data, zlib.crc32(images.numpy().data))
        return MemoryImages(images, labels, class_names(labels.tolist(), source), f"{checksum:08x}")
    files = find_images(source)
    fingerprint = _fingerprint(files, source)
    folder = FolderImages(files.images, files.labels, files.class_names, image_size, channels, fingerprint)
    if len(folder) * channels * height * width > _CACHE_BYTES:
        folder.check_headers()
        return folder
    return MemoryImages(
        folder.read_pixels(range(len(folder))), folder.labels, folder.class_names, fingerprint
    )


def _fingerprint(files: FoundImages, source: str) -> str:
    """A checksum of names (within larger files, lengths) and labels in order, which takes no reading."""
    digest = 0
    for image, label in zip(files.images, files.labels, strict=True):
        about = image.length if isinstance(image, Stored) else image.removeprefix(source)
        digest = zlib.crc32(os.fsencode(f"{about} {label}\n"), digest)
    return f"{digest:08x}"
