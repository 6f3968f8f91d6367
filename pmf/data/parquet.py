"""Parquet files in Hugging Face's image-dataset format: a column of encoded images and usually one of labels.

Parquet compresses by row group, so reading one image costs a whole group. The encoded images are therefore
copied once into a plain file in the user's cache folder, where each image is read by its offset.
"""

import hashlib
import json
import logging
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from pmf.data.labels import number_labels
from pmf.data.shards import Stored
from pmf.errors import UserError

_PICTURES = ("image", "img", "jpg", "png", "webp")  # of several image columns, the first of these is used
_LABELS = ("label", "labels", "fine_label", "class")  # the first that exists is used
_log = logging.getLogger(__name__)
_NO_LABEL = -1  # Hugging Face's value in test splits
_VERSION = 2  # of the cache format


def index_tables(tables: list[Path]) -> tuple[list[Stored], list[int] | None, list[str] | None]:
    """Every image of the tables in order, its label, and the class names if known.

    Labels are class numbers, or strings, which are numbered in sorted order; None if there is no label column
    or it contains only null or -1. Raises UserError if pyarrow is not installed, a file is damaged or has
    a different structure, or the cache cannot be written.
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
    noted = _class_names(parquet, tables[0])
    if not (pixels.is_file() and index.is_file()):
        try:
            _unpack(parquet, tables, pixels, index)
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
    return images, labels if len(labels) == len(images) else None, words or noted


def _unpack(parquet: Any, tables: list[Path], pixels: Path, index: Path) -> None:
    """Write both files under temporary names and rename them when complete: ranks may race to do this."""
    pixels.parent.mkdir(parents=True, exist_ok=True)
    ends: list[int] = []
    values: list[Any] = []
    end = 0
    with tempfile.TemporaryDirectory(dir=pixels.parent) as folder:
        with (Path(folder) / pixels.name).open("wb") as out:
            for table in tables:
                row = 0
                for images, labels in _row_groups(parquet, table):
                    for content, value in zip(images, labels, strict=True):
                        if not content:
                            raise UserError(
                                f"row {row} of {table} must contain the bytes of an image: remove it"
                            )
                        end += out.write(content)
                        ends.append(end)
                        values.append(_label(value, row, table))
                        row += 1
        numbers, words = _number(values, tables[0].parent)
        np.savez(
            Path(folder) / index.name, ends=np.array(ends), labels=np.array(numbers), words=np.array(words)
        )
        os.replace(Path(folder) / pixels.name, pixels)
        os.replace(Path(folder) / index.name, index)


def _label(value: Any, row: int, table: Path) -> int | str | None:
    """An entry of the label column: a class number, a string, or None for null, -1 and pandas' NaN."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value == _NO_LABEL or value != value:
        return None
    if isinstance(value, str) or (isinstance(value, int) and value >= 0):
        return int(value) if isinstance(value, bool) else value
    raise UserError(
        f"row {row} of {table} must contain a class number, 0 or more, or a string, got {value!r}"
    )


def _number(values: list[int | str | None], folder: Path) -> tuple[list[int], list[str]]:
    """Class numbers, and class names if labels are strings; neither if nothing is labelled."""
    kinds = {type(value) for value in values}
    if kinds <= {type(None)}:
        return [], []
    if len(kinds) > 1:
        place = next(i for i, value in enumerate(values) if type(value) is not type(values[0]))
        raise UserError(
            f"{folder} has labels of two kinds: {values[0]!r} for its first image and {values[place]!r} for "
            f"image {place}: remove the rows of one kind"
        )
    if kinds == {str}:
        return number_labels([str(value) for value in values])
    return [int(value) for value in values if value is not None], []


def _row_groups(parquet: Any, table: Path) -> Any:
    """(encoded images, labels) of each row group; labels are None if the table has none."""
    try:
        with parquet.ParquetFile(table) as file:
            image, label = _columns(file.schema_arrow, table)
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=[image] if label is None else [image, label])
                pictures = rows.column(image).combine_chunks()
                pictures = pictures.field("bytes") if str(pictures.type).startswith("struct<") else pictures
                labels = [None] * len(pictures) if label is None else rows.column(label).to_pylist()
                yield pictures.to_pylist(), labels
    except (OSError, ValueError) as error:  # pyarrow's errors derive from ValueError
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{table} is truncated or not a parquet file ({reason}): download it again"
        ) from error


def _columns(schema: Any, table: Path) -> tuple[str, str | None]:
    """The image column, either bytes or a struct containing bytes, and the label column, if any."""
    structs = [
        field.name
        for field in schema
        if str(field.type).startswith("struct<") and field.type.get_field_index("bytes") >= 0
    ]
    plain = [field.name for field in schema if str(field.type) in ("binary", "large_binary")]
    labels = [name for name in _LABELS if schema.get_field_index(name) >= 0]
    pictures = structs or plain
    if len(pictures) > 1:
        pictures = [name for name in _PICTURES if name in pictures]
    if not pictures:
        raise UserError(
            f"{table} must have one column of images (a struct with bytes, as Hugging Face writes it, or "
            f"bytes), or one of them named {' or '.join(_PICTURES)}, got {', '.join(schema.names)}"
        )
    return pictures[0], labels[0] if labels else None


def _class_names(parquet: Any, table: Path) -> list[str] | None:
    """The class names that Hugging Face stores in the file's metadata."""
    try:
        schema = parquet.read_schema(table)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{table} is truncated or not a parquet file ({reason}): download it again"
        ) from error
    image, label = _columns(schema, table)
    if label is None and (others := [name for name in schema.names if name != image]):
        _log.warning(
            "%s: no column is named %s, so its images have no classes; its other columns are %s",
            *(table.parent, " or ".join(_LABELS), ", ".join(others)),
        )
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])
        return [str(name) for name in noted["info"]["features"][label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _cache_folder() -> Path:
    """The folder for unpacked images; UserError if the user has no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pixelmeanflow"
    except RuntimeError as error:
        raise UserError(
            "parquet files are unpacked into a cache, but this user has no home folder: set XDG_CACHE_HOME"
        ) from error
