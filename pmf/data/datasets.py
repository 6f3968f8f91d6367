"""Data sets: images by index, in memory or read from files."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from pmf.data.digits import load_digits
from pmf.data.idx import is_idx_folder, read_idx_folder
from pmf.data.images import check_image, read_image, to_float
from pmf.data.labels import list_images
from pmf.data.memory import MemoryImages
from pmf.data.parquet import find_tables, index_tables
from pmf.data.shards import Stored, find_shards, index_shards
from pmf.errors import UserError

_CACHE_BYTES = 1 << 30  # folders whose cropped pixels fit in this are read once and kept in memory
_READERS = 8  # threads that decode images; Pillow releases the interpreter lock while it decodes


class ImageDataset(Protocol):
    """What training needs to know about its images."""

    class_names: list[str]
    in_memory: bool

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [B, C, H, W], uint8 or float32 in [-1, 1], as they are kept, and labels [B] int64."""
        ...

    def get(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, float32 in [-1, 1] always."""
        ...


class FolderImages:
    """Images in files, or in larger files, read and decoded on threads each time they are asked for."""

    in_memory = False

    def __init__(
        self,
        paths: Sequence[Path | Stored],
        labels: Sequence[int],
        class_names: list[str],
        size: int,
        channels: int,
    ) -> None:
        self.paths, self.labels = paths, torch.tensor(labels)
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
        """uint8 [B, C, H, W]; the first file that cannot be read raises UserError."""
        paths = [self.paths[index] for index in indices]
        images = self._readers.map(lambda path: read_image(path, self.size, self.channels), paths)
        return torch.stack(list(images))

    def check_headers(self) -> None:
        """Open every file without decoding it, so that a wrong file is known before training starts."""
        for _ in self._readers.map(lambda path: check_image(path, self.size), self.paths):
            pass


def load_dataset(source: str, image_size: int, channels: int) -> ImageDataset:
    """``digits``, or images from files.

    A folder of images (pmf/data/labels.py says how), of files in MNIST's format, of WebDataset shards (or a
    pattern of them, pmf/data/shards.py) or of parquet files (pmf/data/parquet.py). Raises UserError where
    there is nothing, one class only, or a file that is damaged, no image, or too small. Up to 1 GiB of
    cropped pixels is decoded at once and stays in memory.
    """
    if channels not in (1, 3):
        raise UserError(f"--channels must be 1 (grey) or 3 (colour), got {channels}")
    if source == "digits":
        if (image_size, channels) != (8, 1):
            raise UserError(
                f"the digits are 8x8 grey images, but {image_size}x{image_size} with {channels} channels was "
                "asked for: use --image-size 8 --channels 1, or give an image folder with --data"
            )
        return load_digits()
    if is_idx_folder(Path(source)):
        images, labels = read_idx_folder(Path(source))
        if tuple(images.shape[1:]) != (channels, image_size, image_size):
            height, width = images.shape[2:]
            raise UserError(
                f"the images of {source} are {height}x{width} and grey, but {image_size}x{image_size} with "
                f"{channels} channels was asked for: use --image-size {height} --channels 1"
            )
        return MemoryImages(images, labels, _names(labels.tolist(), source))
    folder = FolderImages(*_find_images(source), image_size, channels)
    if len(folder) * channels * image_size**2 > _CACHE_BYTES:
        folder.check_headers()
        return folder
    return MemoryImages(folder.read_pixels(range(len(folder))), folder.labels, folder.class_names)


def _find_images(source: str) -> tuple[Sequence[Path | Stored], list[int], list[str]]:
    """Where the images are, the class index of each, and the name of every class."""
    if shards := find_shards(source):
        images, labels = index_shards(shards)
        return images, labels, _names(labels, source)
    if tables := find_tables(source):
        images, labels, names = index_tables(tables)
        return images, labels, _names(labels, source, names)
    files = list_images(Path(source))
    return files.paths, files.labels, files.class_names


def _names(labels: list[int], source: str, noted: list[str] | None = None) -> list[str]:
    """Names of the classes: those noted, or numbers from 0 on. A class without images is one nevertheless."""
    if len(set(labels)) < 2:
        raise UserError(f"{source} has images of one class only: training needs two or more")
    if noted and max(labels) >= len(noted):
        raise UserError(
            f"{source} has an image of class {max(labels)}, but names {len(noted)} classes, 0 to "
            f"{len(noted) - 1}: correct one of them"
        )
    return noted or [str(number) for number in range(max(labels) + 1)]
