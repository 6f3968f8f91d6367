"""Parquet files in Hugging Face's image-dataset format: a column of encoded images and usually one of labels.

Parquet compresses by row group, so reading one image costs a whole group. The encoded images are therefore
copied once into a plain file in the user's cache folder, where each image is read by its offset.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from pmf.data.labels import number_labels
from pmf.data.shards import Stored
from pmf.data.walk import LeftOut
from pmf.errors import UserError

_PICTURES = ("image", "img", "jpg", "png", "webp")  # of several image columns, the first of these is used
_LABELS = ("label", "labels", "fine_label", "class", "coarse_label", "cls")  # the first that exists is used
_log = logging.getLogger(__name__)
_NO_LABEL = -1  # Hugging Face's value in test splits
_UNREADABLE = (OSError, ValueError, RuntimeError)  # which pyarrow's errors derive from
_VERSION = 4  # of the cache format


def index_tables(
    tables: list[Path], left_out: LeftOut
) -> tuple[list[Stored], list[int] | None, list[str] | None]:
    """Every image of the tables in order, its label, and the class names if known.

    Labels are class numbers, or strings, which are numbered in sorted order. If the tables name their classes
    differently, the names are the labels. Null and -1 are no labels: such images are left out if others have
    labels; without any, or without a label column, the labels are None. Raises UserError if pyarrow is not
    installed, a file is damaged or has a different structure, or the cache cannot be written.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(
            f"{tables[0]} is a parquet file, and reading it needs pyarrow: pip install pyarrow"
        ) from error
    facts = [(str(table.resolve()), table.stat().st_size, table.stat().st_mtime_ns) for table in tables]
    name = hashlib.sha256(json.dumps([_VERSION, facts]).encode()).hexdigest()[:16]
    pixels = _cache_folder() / f"{name}.images"
    index = pixels.with_suffix(".npz")
    schemas = [_schema(parquet, table) for table in tables]
    noted = [_class_names(schema, table) for schema, table in zip(schemas, tables, strict=True)]
    _report_unused_columns(schemas[0], tables[0])
    agreed = _agreed(noted, tables)
    if not (pixels.is_file() and index.is_file()):
        try:
            _unpack(parquet, tables, [None] * len(tables) if agreed else noted, pixels, index)
        except OSError as error:
            raise UserError(
                f"cannot unpack {tables[0].parent} to {pixels.parent} ({error.strerror or error}): set "
                "XDG_CACHE_HOME to a writable folder with enough space"
            ) from error
    try:
        with index.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            ends, labels, words = (saved[part].tolist() for part in ("ends", "labels", "words"))
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{index}, unpacked from {tables[0].parent}, is damaged: remove it") from error
    images = [
        Stored(pixels, begin, end - begin, f"image {row} of {tables[0].parent}")
        for row, (begin, end) in enumerate(pairwise([0, *ends]))
    ]
    if len(labels) != len(images):
        return images, None, None
    chosen = [row for row, label in enumerate(labels) if label != _NO_LABEL]
    if len(chosen) < len(images):
        first = next(row for row, label in enumerate(labels) if label == _NO_LABEL)
        left_out.add("without a label", images[first].name, len(images) - len(chosen))
    return [images[row] for row in chosen], [labels[row] for row in chosen], words or agreed


def _agreed(noted: list[list[str] | None], tables: list[Path]) -> list[str] | None:
    """The class names of all tables, or None if none has names or they differ.

    A table without names has those of the others; UserError if they differ.
    """
    known = [names for names in noted if names is not None]
    if any(names != known[0] for names in known):
        if len(known) < len(noted):
            unnamed = tables[noted.index(None)]
            raise UserError(
                f"the files of {unnamed.parent} name their classes differently, and {unnamed.name} names "
                "none: give each the same names"
            )
        return None
    return known[0] if known else None


def _unpack(
    parquet: Any, tables: list[Path], names: list[list[str] | None], pixels: Path, index: Path
) -> None:
    """Write both files under temporary names and rename them when complete: ranks may race to do this.

    names: the class names of each table, by which its numbers are replaced, or None.
    """
    pixels.parent.mkdir(parents=True, exist_ok=True)
    ends: list[int] = []
    values: list[Any] = []
    end = 0
    with tempfile.TemporaryDirectory(dir=pixels.parent) as folder:
        with (Path(folder) / pixels.name).open("wb") as out:
            for table, its_names in zip(tables, names, strict=True):
                row = 0
                for images, labels in _row_groups(parquet, table):
                    for content, value in zip(images, labels, strict=True):
                        if not content:
                            raise UserError(
                                f"row {row} of {table} must contain the bytes of an image: remove it"
                            )
                        end += out.write(content)
                        ends.append(end)
                        values.append(_label(value, row, table, its_names))
                        row += 1
        numbers, words = _number(values, tables[0].parent)
        np.savez(
            Path(folder) / index.name, ends=np.array(ends), labels=np.array(numbers), words=np.array(words)
        )
        os.replace(Path(folder) / pixels.name, pixels)
        os.replace(Path(folder) / index.name, index)


def _label(value: Any, row: int, table: Path, names: list[str] | None) -> int | str | None:
    """An entry of the label column: a class number, a string, or None for null, -1 and pandas' NaN.

    names: class names that replace the numbers, if any.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value == _NO_LABEL or value != value:
        return None
    if isinstance(value, str) or (isinstance(value, int) and value >= 0):
        if isinstance(value, str) or names is None:
            return int(value) if isinstance(value, bool) else value
        if value < len(names):
            return names[value]
        raise UserError(
            f"row {row} of {table} has class {value}, but {table.name} names {len(names)} classes, 0 to "
            f"{len(names) - 1}: correct one of them"
        )
    raise UserError(
        f"row {row} of {table} must contain a class number, 0 or more, or a string, got {value!r}"
    )


def _number(values: list[int | str | None], folder: Path) -> tuple[list[int], list[str]]:
    """Class numbers, and class names if labels are strings; neither if nothing is labelled.

    Images without a label among others that have one get _NO_LABEL.
    """
    labelled = [(place, value) for place, value in enumerate(values) if value is not None]
    if not labelled:
        return [], []
    first, kind = labelled[0], type(labelled[0][1])
    if other := next((pair for pair in labelled if type(pair[1]) is not kind), None):
        raise UserError(
            f"{folder} has labels of two kinds: {first[1]!r} for image {first[0]} and {other[1]!r} "
            f"for image {other[0]}: remove the rows of one kind"
        )
    if kind is str:
        numbers, words = number_labels([str(value) for _, value in labelled])
    else:
        numbers, words = [int(value) for _, value in labelled], []
    found = np.full(len(values), _NO_LABEL)
    found[[place for place, _ in labelled]] = numbers
    return found.tolist(), words


def _row_groups(parquet: Any, table: Path) -> Any:
    """(encoded images, labels) of each row group; labels are None if the table has none."""
    try:
        with parquet.ParquetFile(table) as file:
            image, label = _columns(file.schema_arrow, table)
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=[image] if label is None else [image, label])
                pictures: list[Any] = []
                for chunk in rows.column(image).chunks:  # one by one: as a whole they may exceed 2 GiB
                    is_struct = str(chunk.type).startswith("struct<")
                    pictures += (chunk.field("bytes") if is_struct else chunk).to_pylist()
                labels = [None] * len(pictures) if label is None else rows.column(label).to_pylist()
                yield pictures, labels
    except _UNREADABLE as error:
        raise _unreadable(table, error) from error


def _columns(schema: Any, table: Path) -> tuple[str, str | None]:
    """The image column, either bytes or a struct containing bytes, and the label column, if any.

    Columns are found whatever the case of their names.
    """
    structs = [
        field.name
        for field in schema
        if str(field.type).startswith("struct<") and field.type.get_field_index("bytes") >= 0
    ]
    plain = [field.name for field in schema if str(field.type) in ("binary", "large_binary")]
    labels = _known(_LABELS, schema.names)
    pictures = structs or plain
    if len(pictures) > 1:
        pictures = _known(_PICTURES, pictures)
    if not pictures:
        raise UserError(
            f"{table} must have one column of images (a struct with bytes, as Hugging Face writes it, or "
            f"bytes), or one of them named {' or '.join(_PICTURES)}, got {', '.join(schema.names)}"
        )
    return pictures[0], labels[0] if labels else None


def _known(known: tuple[str, ...], names: list[str]) -> list[str]:
    """The names of columns that are known, in the order of preference; exact spelling before other cases."""
    return sorted(
        (name for name in names if name.lower() in known),
        key=lambda name: (known.index(name.lower()), name not in known),
    )


def _schema(parquet: Any, table: Path) -> Any:
    try:
        return parquet.read_schema(table)
    except _UNREADABLE as error:
        raise _unreadable(table, error) from error


def _unreadable(table: Path, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0]
    return UserError(
        f"{table} is truncated, or no parquet file that pyarrow can read ({reason}): download it again"
    )


def _class_names(schema: Any, table: Path) -> list[str] | None:
    """The class names that Hugging Face stores in the file's metadata, each once.

    Classes of the same name, such as ImageNet's two cranes, get their numbers: names are how classes are told
    apart.
    """
    _, label = _columns(schema, table)
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])
        names = [str(name) for name in noted["info"]["features"][label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None
    count = Counter(names)
    return [f"{name} ({number})" if count[name] > 1 else name for number, name in enumerate(names)]


def _report_unused_columns(schema: Any, table: Path) -> None:
    """Warn if a table has columns but none that is known to hold labels."""
    image, label = _columns(schema, table)
    if label is None and (others := [name for name in schema.names if name != image]):
        _log.warning(
            "%s: no column is named %s, so its images have no classes; its other columns are %s",
            *(table.parent, " or ".join(_LABELS), ", ".join(others)),
        )


def _cache_folder() -> Path:
    """The folder for unpacked images; UserError if the user has no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pixelmeanflow"
    except RuntimeError as error:
        raise UserError(
            "parquet files are unpacked into a cache, but this user has no home folder: set XDG_CACHE_HOME"
        ) from error
