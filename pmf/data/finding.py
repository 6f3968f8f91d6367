"""Find the images of a dataset and their classes: the same rules for folders, shards and tables."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pmf.data.labels import UNLABELLED, images_by_folder, listed_images
from pmf.data.parquet import index_tables
from pmf.data.shards import Stored, index_shards, is_labelled, named_shards
from pmf.data.splits import choose_split, split_of_file, split_of_folder
from pmf.data.walk import OTHER_KIND, LeftOut, image_endings, walk
from pmf.errors import UserError, first_few

__all__ = ["FoundImages", "find_images"]

_SHARD, _TABLE = "tar", "parquet"
_MAX_CLASSES = 10_000_000
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundImages:
    """Encoded images in a fixed order, the class index of each, and the class names."""

    images: Sequence[str | Stored]
    labels: Sequence[int]
    class_names: list[str]


def find_images(source: str) -> FoundImages:
    """Find the images in a folder, in its shards or tables, or in the files that `source` names.

    Shells leave ``~`` as it is in quotes, in patterns and after ``=``, so it is expanded here.
    Folder layouts are described in pmf/data/labels.py. Skipped files are logged in a one-line warning. Raises
    UserError if there are no images or something is damaged.
    """
    source, left_out = os.path.expanduser(source), LeftOut()
    found = _find(source, left_out)
    if not found.images:
        raise UserError(f"{source} contains no images")
    if str(left_out):
        _log.warning("%s: left out %s", source, left_out)
    return found


def _find(source: str, left_out: LeftOut) -> FoundImages:
    if source.lower().endswith(f".{_SHARD}") and not Path(source).is_dir():
        return _in_shards(source, named_shards(source), left_out)
    if source.lower().endswith(f".{_TABLE}") and Path(source).is_file():
        return _in_tables(source, [Path(source)], left_out)
    root = Path(source)
    if not root.is_dir():
        raise UserError(f"--data {root} is not a folder: give 'digits' or a folder of images")
    if (listed := listed_images(root, left_out)) is not None:
        return FoundImages(listed.paths, listed.labels, listed.class_names)
    files: dict[str, list[str]] = {"": [], _SHARD: [], _TABLE: []}
    for path in walk(str(root), image_endings() | {_SHARD, _TABLE}, left_out):
        ending = path.rpartition(".")[2].lower()
        files[ending if ending in files else ""].append(path)
    images, shards, tables = files.values()
    if tables:
        _leave(left_out, "beside the tables", images + shards)
        return _in_tables(source, [root / path for path in _first_part(tables, left_out)], left_out)
    if shards and (not images or is_labelled(root / shards[0])):
        _leave(left_out, "beside the shards", images)
        return _in_shards(source, [root / path for path in _first_part(shards, left_out)], left_out)
    _leave(left_out, OTHER_KIND, shards)
    if not images:
        why = f" (left out {left_out})" if str(left_out) else ""
        raise UserError(f"the folder {root} contains no images{why}: put them into one subfolder per class")
    by_folder = images_by_folder(root, images, left_out)
    return FoundImages(by_folder.paths, by_folder.labels, by_folder.class_names)


def _leave(left_out: LeftOut, why: str, paths: list[str]) -> None:
    if paths:
        left_out.add(why, paths[0], len(paths))


def _first_part(paths: list[str], left_out: LeftOut) -> list[str]:
    """The paths of the first split, or all paths if their names do not indicate a split."""
    part, chosen, others = choose_split(paths, split_of_file)
    _leave(left_out, f"outside the {part} split", others)
    return chosen


def _in_shards(source: str, shards: list[Path], left_out: LeftOut) -> FoundImages:
    images, labels, names = index_shards(shards, left_out)
    if labels is None:
        return _by_folder_in_shards(shards[0], images, left_out)
    parts = [split_of_folder(image.name.removeprefix("./").partition("/")[0]) for image in images]
    if all(parts):  # splits as folders inside the shards
        part, chosen, others = choose_split(range(len(images)), parts.__getitem__)
        _leave(left_out, f"outside the {part} split", [images[i].name for i in others])
        images, labels = [images[i] for i in chosen], [labels[i] for i in chosen]
    return _numbered(source, images, labels, names)


def _by_folder_in_shards(shard: Path, images: list[Stored], left_out: LeftOut) -> FoundImages:
    """Images without labels in shards: folders are classes or splits, as if the shards were unpacked."""
    names = [image.name.removeprefix("./") for image in images]
    while len({name.partition("/")[0] for name in names}) == 1 and all(name.count("/") > 1 for name in names):
        names = [name.partition("/")[2] for name in names]  # one folder around all others
    stored: dict[str, list[Stored]] = {}
    for name, image in zip(names, images, strict=True):
        stored.setdefault(f"{shard}/{name}", []).append(image)
    found = images_by_folder(shard, names, left_out)
    return FoundImages([stored[path].pop(0) for path in found.paths], found.labels, found.class_names)


def _in_tables(source: str, tables: list[Path], left_out: LeftOut) -> FoundImages:
    return _numbered(source, *index_tables(tables, left_out))


def _numbered(
    source: str, images: Sequence[Stored], labels: list[int] | None, names: list[str] | None
) -> FoundImages:
    if not labels:
        return FoundImages(images, [0] * len(images), [UNLABELLED])
    return FoundImages(images, labels, class_names(labels, source, names))


def class_names(labels: Sequence[int], source: str, noted: list[str] | None = None) -> list[str]:
    """Class names: those recorded, or numbers from 0. A class without images still counts, but is logged."""
    if noted and max(labels) >= len(noted):
        raise UserError(
            f"{source} has an image of class {max(labels)}, but names {len(noted)} classes, 0 to "
            f"{len(noted) - 1}: correct one of them"
        )
    if not noted and max(labels) >= _MAX_CLASSES:
        raise UserError(
            f"{source} has an image of class {max(labels)}, but there may be at most {_MAX_CLASSES} classes: "
            "number them from 0 without gaps"
        )
    names = noted or [str(number) for number in range(max(labels) + 1)]
    if lacking := sorted(set(range(len(names))).difference(labels)):
        _log.warning(
            "%s has no images of class %s, so samples of it will be meaningless; classes are numbered from 0",
            *(source, first_few([names[number] for number in lacking], 3)),
        )
    return names
