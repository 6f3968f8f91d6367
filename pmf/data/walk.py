"""List the files below a folder, for training, evaluation and statistics, and record what is skipped.

Links to files and folders are followed, except those that lead back to a folder above. Names that start with
a dot, and ``__MACOSX`` folders, are hidden along with everything below them.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from functools import cache

from PIL import Image

from pmf.errors import UserError

__all__ = ["OTHER_KIND", "LeftOut", "image_endings", "is_hidden", "walk"]

OTHER_KIND = "of unsupported type"
_HIDDEN_FOLDER = "__MACOSX"  # added to archives by macOS
# Formats that Pillow recognises but cannot decode without other programs.
_UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


@cache
def image_endings() -> frozenset[str]:
    """Lower-case file extensions, without the dot, that Pillow and its plugins open as images."""
    known = Image.registered_extensions()
    return frozenset(
        ending[1:].lower() for ending, kind in known.items() if kind in Image.OPEN and kind not in _UNREADABLE
    )


class LeftOut:
    """What a search skips and why, summarised in one line."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = defaultdict(list)  # two each, should the first be used after all

    def add(self, why: str, name: str, count: int = 1) -> None:
        """Record `count` more files or folders; `name` is one of them."""
        self._counts[why] += count
        if len(self._names[why]) < 2:
            self._names[why].append(name)

    def used(self, why: str, name: str) -> None:
        """Take back a file that was recorded and is used after all."""
        self._counts[why] -= 1
        self._names[why] = [other for other in self._names[why] if other != name]

    def __str__(self) -> str:
        """``3 hidden (.DS_Store, ...), 1 of unsupported type (notes.txt)``."""
        return ", ".join(
            f"{count} {why} ({self._names[why][0]}{', ...' if count > 1 else ''})"
            for why, count in self._counts.items()
            if count > 0
        )


def walk(root: str, endings: Collection[str], left_out: LeftOut) -> list[str]:
    """Paths relative to `root` of the files with these extensions, at any depth, folder by folder in order.

    Raises UserError if `root` itself cannot be read.
    """
    found: list[str] = []
    try:
        folders = [(_sorted_entries(root), "", _identity(os.stat(root)))]
    except OSError as error:
        raise UserError(f"the folder {root} cannot be read ({error.strerror}): choose another") from error
    while folders:  # the folders from the root down to the current one
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
                left_out.add(OTHER_KIND, path)
            elif _is_special(entry):
                left_out.add("neither file nor folder", path)
            else:
                found.append(path)
        else:
            try:
                identity = _identity(entry.stat())
                if any(identity == above for _, _, above in folders):
                    left_out.add("link to a folder above it", path)
                else:
                    folders.append((_sorted_entries(entry.path), path + "/", identity))
            except OSError as error:
                left_out.add(f"unreadable: {error.strerror}", path)
    return found


def is_hidden(path: str) -> bool:
    """Whether the name of a path, or of a folder above it, is hidden."""
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
    except OSError:  # a circular link
        return False


def _is_special(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry is a pipe, socket or device. A dangling link counts as a missing file."""
    try:
        return not entry.is_file() and (not entry.is_symlink() or os.path.exists(entry.path))
    except OSError:
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
