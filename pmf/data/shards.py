"""WebDataset shards: uncompressed tar files in which ``<key>.jpg`` (png, webp) stands beside ``<key>.cls``.

The shards are indexed once, header by header; an image is then read by its offset. So shuffling is a true
permutation of all images, and resuming is exact, as with a folder. (The package webdataset streams shards and
shuffles within a buffer, whose state a checkpoint would have to hold.)
"""

import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from pmf.errors import UserError

_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
_LABEL = ".cls"
_BLOCK = 512  # a tar file ends with blocks of zeros
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, slots=True)
class Stored:
    """An encoded image within a larger file."""

    file: Path
    offset: int
    length: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} in {self.file}"

    def read(self) -> bytes:
        """Its bytes; UserError where the file is gone or shorter than it was."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.length)
        except OSError as error:
            raise UserError(f"{self.file} cannot be read ({error.strerror}): put it back") from error
        if len(content) != self.length:
            raise UserError(f"{self.file} is cut off: {self.name} ends after it; copy the file again")
        return content


def find_shards(source: str) -> list[Path]:
    """The tar files that ``--data`` names: a folder of them, one, or a pattern ``{000000..000063}``.

    An empty list where it names none; UserError where one of the pattern is missing.
    """
    if Path(source).is_dir():
        return sorted(Path(source).glob("*.tar"))
    if not source.endswith(".tar"):
        return []
    shards = [Path(name) for name in _expand(source)]
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"the shard {shard} is missing: put it back, or name the shards that there are")
    return shards


def _expand(pattern: str) -> list[str]:
    """``a-{08..11}.tar`` is a-08.tar, a-09.tar, a-10.tar, a-11.tar."""
    words = _RANGE.split(pattern)
    ranges = [
        [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
        for low, high in zip(words[1::3], words[2::3], strict=True)
    ]
    plain = words[::3]
    return [
        "".join(part for pair in zip(plain, (*numbers, ""), strict=True) for part in pair)
        for numbers in product(*ranges)
    ]


def index_shards(shards: Sequence[Path]) -> tuple[list[Stored], list[int]]:
    """Every image of the shards in their order, and its label; UserError for a damaged shard."""
    images: list[Stored] = []
    labels: list[int] = []
    for shard in shards:
        pictures, numbers = _index(shard)
        for key, picture in pictures.items():
            if key not in numbers:
                raise UserError(f"{shard} has no label {key}{_LABEL} beside {picture.name}: pack it again")
            images.append(picture)
            labels.append(numbers[key])
    return images, labels


def _index(shard: Path) -> tuple[dict[str, Stored], dict[str, int]]:
    pictures: dict[str, Stored] = {}
    numbers: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")  # WebDataset's key ends at the first dot
                key, kind = f"{folder}/{stem}", f".{extension.lower()}"
                if not member.isfile() or name.startswith("."):
                    continue
                if kind in _IMAGES:
                    pictures[key] = Stored(shard, member.offset_data, member.size, member.name)
                elif kind == _LABEL:
                    content = archive.extractfile(member)
                    numbers[key] = _label(content.read() if content else b"", shard, member.name)
            complete = shard.stat().st_size >= archive.offset + _BLOCK
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"the shard {shard} is cut off or no uncompressed tar file ({error}): copy it again"
        ) from error
    if not complete:
        raise UserError(f"the shard {shard} is cut off: copy it again")
    if not pictures:
        raise UserError(f"the shard {shard} holds no image ({', '.join(_IMAGES)}): leave it out")
    return pictures, numbers


def _label(content: bytes, shard: Path, name: str) -> int:
    text = content.decode("utf-8", "replace").strip()
    if not text.isdecimal():
        raise UserError(f"{name} in {shard} must hold a class number, 0 or more, got {text[:20]!r}")
    return int(text)
