"""Data sets: images by index, in memory or read from files."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch

from pmf.data.digits import load_digits
from pmf.data.finding import class_names, find_images
from pmf.data.idx import is_idx_folder, read_idx_folder
from pmf.data.images import Encoded, check_image, read_image, to_float
from pmf.data.memory import MemoryImages
from pmf.errors import UserError
from pmf.sizes import Size, height_and_width, size_in_words

_CACHE_BYTES = 1 << 30  # folders whose cropped pixels fit in this are read once and kept in memory
_QUEUED = 4096  # images that wait for a thread: a million of them would fill gigabytes
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
        paths: Sequence[Encoded],
        labels: Sequence[int],
        class_names: list[str],
        size: Size,
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
        indices = list(indices)
        pixels = torch.empty((len(indices), self.channels, *height_and_width(self.size)), dtype=torch.uint8)
        rows = enumerate(indices)

        def read(place: int, index: int) -> None:
            pixels[place] = read_image(self.paths[index], self.size, self.channels)

        while some := list(islice(rows, _QUEUED)):
            list(self._readers.map(read, *zip(*some, strict=True)))
        return pixels

    def check_headers(self) -> None:
        """Open every file without decoding it, so that a wrong file is known before training starts."""
        paths = iter(self.paths)
        while some := list(islice(paths, _QUEUED)):
            list(self._readers.map(lambda path: check_image(path, self.size), some))


def load_dataset(source: str, image_size: Size, channels: int) -> ImageDataset:
    """``digits``, or images from files.

    A folder of images (pmf/data/labels.py says how), of files in MNIST's format, of WebDataset shards (or a
    pattern of them, pmf/data/shards.py) or of parquet files (pmf/data/parquet.py). Images without classes
    have one class. What of a source is left out, such as its test part, is logged in one line, as a warning.
    image_size: a number for squares, or (height, width). Raises UserError where there is nothing, or a file
    that is damaged, no image, or too small. Up to 1 GiB of cropped pixels is decoded at once and stays in
    memory.
    """
    height, width = height_and_width(image_size)
    if channels not in (1, 3):
        raise UserError(f"--channels must be 1 (grey) or 3 (colour), got {channels}")
    if source == "digits":
        if (height, width, channels) != (8, 8, 1):
            raise UserError(
                f"the digits are 8x8 grey images, but {height}x{width} with {channels} channels was "
                "asked for: use --image-size 8 --channels 1, or give an image folder with --data"
            )
        return load_digits()
    if is_idx_folder(Path(source)):
        images, labels = read_idx_folder(Path(source))
        found = images.shape[2:]
        if tuple(images.shape[1:]) != (channels, height, width):
            raise UserError(
                f"the images of {source} are {size_in_words(found)} and grey, but {height}x{width} with "
                f"{channels} channels was asked for: use --image-size {size_in_words(found)} --channels 1"
            )
        return MemoryImages(images, labels, class_names(labels.tolist(), source))
    files = find_images(source)
    folder = FolderImages(files.images, files.labels, files.class_names, image_size, channels)
    if len(folder) * channels * height * width > _CACHE_BYTES:
        folder.check_headers()
        return folder
    return MemoryImages(folder.read_pixels(range(len(folder))), folder.labels, folder.class_names)
