"""The files below a folder: one walk for training, evaluation and statistics, and what it leaves out.

Links are followed, to files and to folders; one that leads back into a folder it lies in is left out. Names
that start with a dot and the folders ``__MACOSX`` are hidden: nothing below them counts.
"""

import os
from collections.abc import Collection, Iterator
from functools import cache

from PIL import Image

from pmf.errors import UserError

__all__ = ["LeftOut", "image_endings", "is_hidden", "walk"]

_HIDDEN_FOLDER = "__MACOSX"  # what macOS adds to archives
# Formats whose files Pillow recognises and, without other programs, does not decode.
_UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


@cache
def image_endings() -> frozenset[str]:
    """Lower-case endings without their dot of all files that Pillow, with its plugins, opens as images."""
    known = Image.registered_extensions()
    return frozenset(
        ending[1:].lower() for ending, kind in known.items() if kind in Image.OPEN and kind not in _UNREADABLE
    )


class LeftOut:
    """What a search leaves out and why, for one line in the end."""

    def __init__(self) -> None:
        self._reasons: dict[str, list[str | int]] = {}

    def add(self, why: str, name: str, count: int = 1) -> None:
        """`count` files or folders more, `name` being one of them."""
        known = self._reasons.setdefault(why, [name, 0])
        known[1] = int(known[1]) + count

    def __str__(self) -> str:
        """``3 hidden (.DS_Store, ...), 1 of another kind (notes.txt)``."""
        return ", ".join(
            f"{count} {why} ({name}{', ...' if int(count) > 1 else ''})"
            for why, (name, count) in self._reasons.items()
        )


def walk(root: str, endings: Collection[str], left_out: LeftOut) -> list[str]:
    """Paths relative to `root` of its files with these endings, at any depth, folder by folder in order.

    Raises UserError where `root` itself cannot be read.
    """
    found: list[str] = []
    try:
        folders = [(_sorted_entries(root), "", _identity(os.stat(root)))]
    except OSError as error:
        raise UserError(f"the folder {root} cannot be read ({error.strerror}): choose another") from error
    while folders:  # the folders from the root down to the one that is being read
        entries, prefix, _ = folders[-1]
        entry = next(entries, None)
        if entry is None:
            folders.pop()
            continue
        name = entry.name
        path = prefix + name
        if is_hidden(name):
            left_out.add("hidden", path)
        elif not _is_folder(entry):
            if name.rpartition(".")[2].lower() not in endings or "." not in name:
                left_out.add("of another kind", path)
            elif _is_special(entry):
                left_out.add("neither file nor folder", path)
            else:
                found.append(path)
        else:
            try:
                identity = _identity(entry.stat())
                if any(identity == above for _, _, above in folders):
                    left_out.add("link into a folder it lies in", path)
                else:
                    folders.append((_sorted_entries(entry.path), path + "/", identity))
            except OSError as error:
                left_out.add(f"unreadable: {error.strerror}", path)
    return found


def is_hidden(path: str) -> bool:
    """Whether a path's name, or that of a folder above it, is hidden."""
    return any(
        part == _HIDDEN_FOLDER or (part.startswith(".") and part not in (".", ".."))
        for part in path.split("/")
    )


def _sorted_entries(folder: str) -> "Iterator[os.DirEntry[str]]":
    with os.scandir(folder) as entries:
        return iter(sorted(entries, key=lambda entry: entry.name))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_special(entry: "os.DirEntry[str]") -> bool:
    """Whether it is a pipe, a socket or a device. A link to nothing is a file that is missing."""
    try:
        return not entry.is_file() and (not entry.is_symlink() or os.path.exists(entry.path))
    except OSError:
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
