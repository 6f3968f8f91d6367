"""Assign classes to images: the supported folder layouts.

1. A subfolder per class: ``folder/<class>/**/<image>``; classes are numbered in sorted order of their names.
2. ``folder/labels.csv``: a header row ``file,label``, then a row per image; ``file`` is relative to the
   folder, ``label`` is any string. Images that the file does not list are left out.
3. ``folder/dataset.json``: ``{"labels": [["<file>", <integer>], ...]}``, as written by the StyleGAN and EDM
   tools; if the list is null, the images have no classes.
4. ``folder/metadata.csv`` or ``metadata.jsonl`` with ``file_name`` and ``label``, as Hugging Face's image
   folders have it; other columns, or a file without labels, are ignored.
5. An unpacked emoji package, whose ``emoji.json`` names the categories (pmf/data/emoji.py).
6. Images only, in the folder itself or in one subfolder: they have no classes.

Labels that are all integers are numbered numerically, others in sorted order. Splits such as ``train`` and
``val``, side by side above the classes or inside every class, are not classes (pmf/data/splits.py): the first
split is read. They may lie one folder down, as in ``images/train``, next to other folders. Nor are ``images``
and, beside it, ``labels`` or ``masks``: the images are read.
"""

import csv
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmf.data.emoji import emoji_by_category, is_emoji_package
from pmf.data.splits import TRAINING, choose_split, split_of_folder
from pmf.data.walk import OTHER_KIND, LeftOut, image_endings, walk
from pmf.errors import UserError

__all__ = ["UNLABELLED", "LabelledFiles", "images_by_folder", "listed_images", "number_labels"]

_log = logging.getLogger(__name__)

_CSV, _JSON = "labels.csv", "dataset.json"  # in any case
_IMAGES = {"images", "image", "imgs", "img", "jpegimages"}
_ANNOTATIONS = {
    "labels", "label", "masks", "mask", "annotations", "annotation", "segmentations", "segmentation",
    "segmentationclass", "segmentationobject",
}  # fmt: skip
UNLABELLED = "0"
"""The name of the single class of images that have none."""


@dataclass(frozen=True)
class LabelledFiles:
    """Image files, the class index of each, and the class names."""

    paths: list[str]
    labels: list[int]
    class_names: list[str]
    list_file: str | None = None
    """The name of the file that lists them, if any."""


def listed_images(root: Path, left_out: LeftOut) -> LabelledFiles | None:
    """The images listed with their labels by a file in the folder; None if there is no such file.

    The file's name may be in capitals. Raises UserError if it is malformed or lists a missing image.
    """
    readers: dict[str, Callable[[Path], list[tuple[str, str]] | None]] = {
        _CSV: _read_csv,
        _JSON: _read_json,
        "metadata.csv": _read_metadata,
        "metadata.jsonl": _read_metadata,
    }
    if is_emoji_package(root):
        readers["emoji.json"] = _read_emoji
    for name, read in readers.items():
        if (source := _list_file(root, name)) is not None:
            if (pairs := read(source)) is None:
                continue
            listed = _check_listed(source, root, pairs)
            if read is not _read_emoji:  # most of a package's images are meant to be left out
                _report_unlisted(source, root, listed, left_out)
            return listed
    return None


def _list_file(root: Path, name: str) -> Path | None:
    """A file in the folder by its name, preferably as spelt, or with other capitals."""
    others = (entry for entry in sorted(os.listdir(root)) if entry.lower() == name) if root.is_dir() else ()
    return next((root / entry for entry in (name, *others) if (root / entry).is_file()), None)


def _report_unlisted(source: Path, root: Path, listed: LabelledFiles, left_out: LeftOut) -> None:
    taken = set(listed.paths)
    rest = [path for path in walk(str(root), image_endings(), LeftOut()) if f"{root}/{path}" not in taken]
    if rest:
        left_out.add(f"not listed in {source.name}", rest[0], len(rest))


def images_by_folder(root: Path, images: Sequence[str], left_out: LeftOut) -> LabelledFiles:
    """Assign classes by the first folder of each path; `images` are relative to root and not empty."""
    folders = sorted({path.partition("/")[0] for path in images if "/" in path})
    loose = [path for path in images if "/" not in path]
    if folders and _are_splits(folders, images):
        return _first_part(root, folders, images, left_out)
    lower = {name.lower(): name for name in folders}
    pictures = [lower[name] for name in lower if name in _IMAGES]
    if len(pictures) == 1 and 1 < len(folders) == len(lower.keys() & (_IMAGES | _ANNOTATIONS)):
        (chosen,) = pictures
        others = [path for path in images if not path.startswith(f"{chosen}/")]
        left_out.add(f"beside the folder {chosen}", others[0], len(others))
        return images_by_folder(root / chosen, _within(chosen, images), left_out)
    if len(folders) == 1 and not loose and _holds_splits(below := _within(folders[0], images)):
        return images_by_folder(root / folders[0], below, left_out)
    if len(folders) < 2 or _list_file(root, _JSON):  # dataset.json with null labels
        names = folders if len(folders) == 1 and not loose else [UNLABELLED]
        deeper = {path.split("/")[1] for path in images if path.count("/") > 1}
        if len(deeper) > 1 and root.is_dir():  # a folder in a shard cannot be named
            _log.warning(
                "%s has one class folder, %s: for a class per folder in it (%s, ...) give --data %s",
                *(root, folders[0], min(deeper), root / folders[0]),
            )
        return LabelledFiles([f"{root}/{path}" for path in images], [0] * len(images), names)
    if loose:
        left_out.add("beside the class folders", loose[0], len(loose))
    known = set(folders)
    for name in sorted(os.listdir(root)) if root.is_dir() else ():  # a shard has no other folders
        if name not in known and (root / name).is_dir() and not name.startswith("."):
            left_out.add("folders without images", name)
    images = _first_part_of_classes([path for path in images if "/" in path], left_out)
    folders = sorted({path.partition("/")[0] for path in images})
    index = {name: number for number, name in enumerate(folders)}
    labels = [index[path.partition("/")[0]] for path in images]
    return LabelledFiles([f"{root}/{path}" for path in images], labels, folders)


def _within(folder: str, images: Sequence[str]) -> list[str]:
    """The images in a folder, relative to it."""
    return [path[len(folder) + 1 :] for path in images if path.startswith(f"{folder}/")]


def _folders(images: Sequence[str]) -> set[str]:
    return {path.partition("/")[0] for path in images if "/" in path}


def _are_splits(folders: Sequence[str], images: Sequence[str]) -> bool:
    """Whether folders side by side are splits: all of them, or the training split and others.

    Next to folders with other names, a folder named train is a split if there is another split, or if it has
    classes and the other folders have only those.
    """
    splits = {folder: split_of_folder(folder) for folder in folders}
    if None not in splits.values():
        return True
    if TRAINING not in splits.values():
        return False
    if len(set(splits.values())) > 2:
        return True
    classes = [_folders(_within(folder, images)) for folder in folders if splits[folder] == TRAINING]
    others = [_folders(_within(folder, images)) for folder in folders if splits[folder] != TRAINING]
    return len(classes[0]) > 1 and all(other <= classes[0] for other in others)


def _holds_splits(images: Sequence[str]) -> bool:
    """Whether the images lie in splits, perhaps below a chain of single folders."""
    folders = sorted(_folders(images))
    if not folders or any("/" not in path for path in images):
        return False
    return _are_splits(folders, images) or (len(folders) == 1 and _holds_splits(_within(folders[0], images)))


def _first_part(root: Path, folders: list[str], images: Sequence[str], left_out: LeftOut) -> LabelledFiles:
    """The images of the first of several splits side by side, treated as a separate folder."""
    part, chosen, others = choose_split(folders, split_of_folder)
    loose = [path for path in images if "/" not in path]
    if loose and part != TRAINING:  # images beside a lone test folder are training images
        left_out.add(f"outside the {TRAINING} split", folders[0], len(images) - len(loose))
        return LabelledFiles([f"{root}/{path}" for path in loose], [0] * len(loose), [UNLABELLED])
    for name in others:
        count = sum(path.startswith(f"{name}/") for path in images)
        what = f"outside the {part} split" if split_of_folder(name) else f"beside the {part} split"
        left_out.add(what, name, count)
    if loose:
        left_out.add(f"beside the folder {chosen[0]}", loose[0], len(loose))
    if len(chosen) > 1:
        raise UserError(f"{root} has several {part} folders ({', '.join(chosen)}): give one of them")
    below = root / chosen[0]
    if (listed := listed_images(below, left_out)) is not None:
        left_out.used(OTHER_KIND, f"{chosen[0]}/{listed.list_file}")
        return listed
    begin = len(chosen[0]) + 1
    return images_by_folder(
        below, [path[begin:] for path in images if path.startswith(f"{chosen[0]}/")], left_out
    )


def _first_part_of_classes(images: list[str], left_out: LeftOut) -> list[str]:
    """The first split if every class has the same ones, as in ``cat/train/1.png``, ``cat/test/2.png``."""

    def part_of(path: str) -> str | None:
        folders = path.split("/")[1:-1]
        return split_of_folder(folders[0]) if folders else None

    parts = {part_of(path) for path in images}
    if None in parts or len(parts) < 2:
        return images
    part, chosen, others = choose_split(images, part_of)
    left_out.add(f"outside the {part} split", others[0], len(others))
    return chosen


def _read_csv(source: Path) -> list[tuple[str, str]]:
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source} cannot be read as a CSV file in UTF-8 ({error})") from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if header[:2] == ["file", "label"] and len(header) > 2:
        raise UserError(
            f"{source} must have two columns, file and label: remove {', '.join(map(repr, rows[0][2:]))}"
        )
    if header != ["file", "label"]:
        found = f", got {','.join(rows[0])[:60]!r}" if rows else ""
        raise UserError(f"the first row of {source} must be file,label{found}")
    pairs = []
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != 2 or not row[0].strip() or not row[1].strip():
            raise UserError(
                f"row {number} of {source} must contain a file and a label, got {','.join(row)!r}"
            )
        pairs.append((row[0].strip(), row[1].strip()))
    return pairs


def _read_json(source: Path) -> list[tuple[str, str]] | None:
    """The (file, label) pairs of the file, or None if it states that there are no labels."""
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{source} cannot be read as JSON ({error})") from error
    if isinstance(content, dict) and content.get("labels", ()) is None:
        return None
    entries = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(
            f'{source} must contain {{"labels": [["file", integer], ...]}}, or null for no labels'
        )
    pairs = []
    for number, entry in enumerate(entries):
        pair = entry if isinstance(entry, list) and len(entry) == 2 else [None, None]
        if not isinstance(pair[0], str) or type(pair[1]) is not int:
            shown = json.dumps(entry)[:80]
            raise UserError(f'entry {number} of "labels" in {source} must be ["file", integer], got {shown}')
        pairs.append((entry[0], str(entry[1])))
    return pairs


def _read_metadata(source: Path) -> list[tuple[str, str]] | None:
    """The (file, label) pairs of Hugging Face's metadata, or None if it has no labels."""
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            if source.suffix.lower() == ".csv":
                rows: list[Any] = list(csv.DictReader(file, strict=True, skipinitialspace=True))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{source} cannot be read ({error}): repair it, or remove it") from error
    rows = [row if isinstance(row, dict) else {} for row in rows]
    if not any({"file_name", "label"} <= row.keys() for row in rows):
        return None
    pairs = []
    for number, row in enumerate(rows):
        name, label = row.get("file_name"), row.get("label")
        if not name or not isinstance(name, str) or type(label) not in (str, int) or label == "":
            raise UserError(f"entry {number} of {source} must have a file_name and a label, text or a number")
        pairs.append((name, str(label)))
    return pairs


def _read_emoji(source: Path) -> list[tuple[str, str]]:
    try:
        return emoji_by_category(source.parent)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source} is damaged ({error}): unpack the emoji package again") from error


def _check_listed(source: Path, root: Path, pairs: list[tuple[str, str]]) -> LabelledFiles:
    if not pairs:
        raise UserError(f"{source} lists no images")
    # ./a.png and a.png are the same file
    pairs = [(os.path.normpath(_with_slashes(file, root)), label) for file, label in pairs]
    seen: set[str] = set()
    for file, _ in pairs:
        if os.path.isabs(file) or file.split("/")[0] == "..":
            raise UserError(f"{source} lists {file!r}, outside {root}: use paths relative to the folder")
        if file in seen:
            raise UserError(f"{source} lists {file!r} twice: keep one of the two rows")
        if not os.path.isfile(f"{root}/{file}"):
            why = ": separate folders by /" if "\\" in file else ""
            raise UserError(f"{source} lists {file!r}, which does not exist in {root}{why}")
        seen.add(file)
    labels, names = number_labels([label for _, label in pairs])
    return LabelledFiles([f"{root}/{file}" for file, _ in pairs], labels, names, source.name)


def _with_slashes(file: str, root: Path) -> str:
    r"""A path with / for \, as lists from Windows have it, if only that exists: a name may contain \."""
    if "\\" not in file or os.path.isfile(f"{root}/{file}"):
        return file
    slashed = file.replace("\\", "/")
    return slashed if os.path.isfile(f"{root}/{slashed}") else file


def number_labels(words: Sequence[str]) -> tuple[list[int], list[str]]:
    """The class index of every label, and the class names; numerical order if all are integers."""
    found = set(words)
    numbers = {int(word) for word in found if word.removeprefix("-").isdecimal()}
    names = [str(n) for n in sorted(numbers)] if {str(n) for n in numbers} == found else sorted(found)
    index = {name: position for position, name in enumerate(names)}
    return [index[word] for word in words], names
