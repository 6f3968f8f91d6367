"""WebDataset shards: uncompressed tar files of images, each ``<key>.jpg`` with its class in ``<key>.cls``.

``<key>.json`` may hold it instead, as a number or text under "label", "class" or "cls". Without either,
classes come from the folders in the shards, if any, by the rules for folders of files (pmf/data/finding.py).
Keys may contain dots.

The shards are indexed once by reading their headers; images are then read by offset. Shuffling is therefore a
true permutation of all images, and resuming is exact, as with a folder. (The webdataset package streams
shards and shuffles within a buffer, whose state a checkpoint would have to contain.)
"""

import json
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

from pmf.data.labels import number_labels
from pmf.data.walk import OTHER_KIND, LeftOut, image_endings, is_hidden
from pmf.errors import UserError

_LOOKED_AT = 200  # members inspected to decide whether an archive is a shard
_NUMBER, _JSON = "cls", "json"  # endings of members that may hold a label
_IN_JSON = ("label", "class", "cls")  # the first that holds one is used
_MAX_LINKS = 8  # links followed from one member
_BLOCK = 512  # size of the zero blocks that end a tar file
_DAMAGED = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError)  # what tarfile raises
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
        """Read the image's bytes; UserError if the file is missing or shorter than before."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.length)
        except OSError as error:
            raise UserError(f"{self.file} cannot be read ({error.strerror}): restore it") from error
        if len(content) != self.length:
            raise UserError(f"{self.file} is truncated: {self.name} extends past its end; copy it again")
        return content


class _Label(NamedTuple):
    """An image's class, a number or text, and the member that holds it."""

    value: int | str
    name: str


def named_shards(source: str) -> list[Path]:
    """The tar files given by a name or a pattern such as ``{000000..000063}.tar``.

    Raises UserError if a file of the pattern is missing.
    """
    shards = [Path(name) for name in _expand(source)]
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"the shard {shard} is missing: restore it, or name only existing shards")
    return shards


def _expand(pattern: str) -> list[str]:
    """Expand ``a-{08..11}.tar`` to a-08.tar, a-09.tar, a-10.tar, a-11.tar."""
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


def index_shards(
    shards: Sequence[Path], left_out: LeftOut
) -> tuple[list[Stored], list[int] | None, list[str] | None]:
    """Every image of the shards in order, its label (None if no image has one), and the names of text labels.

    Raises UserError for a damaged shard, if only some of the images have labels, or for labels of two kinds.
    """
    images: list[Stored] = []
    labels: list[_Label] = []
    unlabelled: tuple[Path, Stored] | None = None
    for shard in shards:
        pictures, found = _index(shard, left_out)
        pairs = list(_pair(pictures, found, shard, left_out))
        if found and not any(key in found for _, key in pairs):
            raise UserError(
                f"{shard} has labels such as {next(iter(found.values())).name}, none of which has an image: "
                "pack it again, with one name for both"
            )
        for picture, key in pairs:
            images.append(picture)
            if key in found:
                labels.append(found[key])
            elif unlabelled is None:
                unlabelled = shard, picture
    if unlabelled is not None and labels:
        shard, picture = unlabelled
        raise UserError(
            f"{shard} has no label {_without_ending(picture.name)}.{_NUMBER} beside {picture.name}, but "
            "other images have one: pack it again"
        )
    if unlabelled is not None:
        return images, None, None
    texts = [label.value for label in labels if isinstance(label.value, str)]
    if not texts:
        return images, [int(label.value) for label in labels], None
    if len(texts) < len(labels):
        number = next(label for label in labels if not isinstance(label.value, str))
        raise UserError(
            f"{shards[0].parent} has labels of two kinds, such as {texts[0]!r} and {number.value} in "
            f"{number.name}: pack it again, with one kind"
        )
    return images, *number_labels(texts)


def is_labelled(shard: Path) -> bool:
    """Whether the first members of a tar file look like a labelled WebDataset shard."""
    try:
        with tarfile.open(shard, "r:") as archive:
            return any(
                _ending(member.name) == _NUMBER
                or (_ending(member.name) == _JSON and _in_json(_content(archive, member)) is not None)
                for member in islice(archive, _LOOKED_AT)
            )
    except _DAMAGED:
        return False


def _index(shard: Path, left_out: LeftOut) -> tuple[dict[str, Stored], dict[str, _Label]]:
    """Images and labels by key: the name up to its last dot. Links to files in the archive are followed.

    A file written twice counts as the last one, as when the archive is unpacked. A .cls file precedes a .json
    file.
    """
    pictures: dict[str, Stored] = {}
    labels: dict[str, _Label] = {}
    in_json: dict[str, _Label] = {}
    endings = image_endings()
    try:
        with shard.open("rb") as tar, tarfile.open(fileobj=tar, mode="r:") as archive:
            members = {posixpath.normpath(member.name): member for member in archive if not member.isdir()}
            tar.seek(archive.offset)  # where it ended for tarfile: before zeros, or at a damaged header
            complete = tar.read(_BLOCK) == bytes(_BLOCK)
            for path, count in Counter(posixpath.normpath(m.name) for m in archive if not m.isdir()).items():
                if count > 1:
                    left_out.add("written again later in the shard", path, count - 1)
            for path, member in members.items():
                key, kind = _without_ending(path), _ending(member.name)
                if is_hidden(member.name):
                    left_out.add("hidden", member.name)
                elif kind not in endings and kind not in (_NUMBER, _JSON):
                    left_out.add(OTHER_KIND, member.name)
                elif (file := _followed(member, members)) is None:
                    left_out.add("no file, or a link to none in the archive", member.name)
                elif kind in endings:
                    if key in pictures:
                        raise UserError(
                            f"{shard} has two images with one name, {pictures[key].name} and {member.name}: "
                            "rename the one that is not to be trained on"
                        )
                    pictures[key] = Stored(shard, file.offset_data, file.size, member.name)
                elif kind == _NUMBER:
                    labels[key] = _Label(_number(_content(archive, file), shard, member.name), member.name)
                elif (value := _in_json(_content(archive, file))) is not None:
                    in_json[key] = _Label(value, member.name)
                else:
                    left_out.add("without a label", member.name)
    except _DAMAGED as error:
        raise UserError(
            f"the shard {shard} is truncated or not an uncompressed tar file ({error}): copy it again"
        ) from error
    if not complete:
        raise UserError(f"the shard {shard} is truncated or damaged: copy it again")
    if not pictures:
        raise UserError(f"the shard {shard} contains no image that Pillow can open: leave it out")
    return pictures, in_json | labels


def _followed(member: tarfile.TarInfo, members: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The file that a member is, or to which it links within the archive; None if there is none."""
    for _ in range(_MAX_LINKS):
        if member.isfile():
            return member
        if member.islnk():  # a path from the archive's root, to a file that was written before
            target = member.linkname
        elif member.issym():
            target = posixpath.join(posixpath.dirname(member.name), member.linkname)
        else:
            return None
        if (found := members.get(posixpath.normpath(target))) is None:
            return None
        member = found
    return None


def _pair(
    pictures: dict[str, Stored], labels: dict[str, _Label], shard: Path, left_out: LeftOut
) -> Iterator[tuple[Stored, str]]:
    """Every image with its label's key: its own, or its name up to the first dot (``1.left.png``, ``1.cls``).

    If several images share a label, the one with the label's own name is used; UserError if there is none.
    """
    sharing: dict[str, Stored] = {}
    for key, picture in pictures.items():
        folder, slash, name = key.rpartition("/")
        short = f"{folder}{slash}{name.partition('.')[0]}"
        if key in labels or short not in labels:
            yield picture, key
        elif short in pictures:
            left_out.add("beside the image of its label", picture.name)
        elif short in sharing:
            raise UserError(
                f"{shard} has one label {labels[short].name} for {sharing[short].name} and {picture.name}: "
                "rename the image to train on to match the label"
            )
        else:
            sharing[short] = picture
            yield picture, short


def _without_ending(name: str) -> str:
    """``a/b.c.png`` without ``.png``; dots in folder names do not count."""
    stem, dot, ending = name.rpartition(".")
    return stem if dot and "/" not in ending else name


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        file = archive.extractfile(member)  # None for a folder; links may lead nowhere, or in circles
    except (KeyError, RecursionError):
        return b""
    return file.read() if file else b""


def _in_json(content: bytes) -> int | str | None:
    """The label in an image's metadata; None if there is none, or Hugging Face's -1."""
    try:
        about = json.loads(content)
    except (ValueError, RecursionError):
        return None
    for name in _IN_JSON if isinstance(about, dict) else ():
        value = about.get(name)
        if (isinstance(value, str) and value) or (type(value) is int and value >= 0):
            return value
    return None


def _number(content: bytes, shard: Path, name: str) -> int:
    text = content.decode("utf-8-sig", "replace").strip()
    if not text.isdecimal():
        raise UserError(f"{name} in {shard} must contain a class number, 0 or more, got {text[:20]!r}")
    return int(text)
