"""Parquet files as Hugging Face keeps image data sets: a column of encoded images, a column of class numbers.

Parquet is compressed by row groups, so that one image costs a whole group. The encoded images are therefore
copied once into one plain file in the user's cache folder, from which any image is read by its offset.
"""

import hashlib
import json
import os
import re
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from pmf.data.shards import Stored
from pmf.errors import UserError

_LABELS = ("label", "labels", "fine_label", "class")  # the first of them that is there


def find_tables(source: str) -> list[Path]:
    """The parquet files of a folder, or of its part ``train``: those below or called so, if there are any."""
    folder = Path(source)
    tables = sorted(folder.rglob("*.parquet")) if folder.is_dir() else []
    return [table for table in tables if _is_for_training(table.relative_to(folder))] or tables


def index_tables(tables: list[Path]) -> tuple[list[Stored], list[int], list[str] | None]:
    """Every image of the tables in their order, its label, and the classes' names where they are noted.

    Raises UserError where pyarrow is not installed, or a file is damaged or of another form.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(
            f"{tables[0]} is a parquet file, and reading it needs pyarrow: pip install pyarrow"
        ) from error
    facts = [(str(table.resolve()), table.stat().st_size, table.stat().st_mtime_ns) for table in tables]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    pixels = _cache_folder() / f"{name}.images"
    index = pixels.with_suffix(".npz")
    names = _class_names(parquet, tables[0])
    if not (pixels.is_file() and index.is_file()):
        _unpack(parquet, tables, pixels, index)
    try:
        with index.open("rb") as file, np.load(file) as saved:
            ends, labels = saved["ends"].tolist(), saved["labels"].tolist()
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{index}, unpacked from {tables[0].parent}, is damaged: remove it") from error
    images = [
        Stored(pixels, begin, end - begin, f"image {row} of {tables[0].parent}")
        for row, (begin, end) in enumerate(pairwise([0, *ends]))
    ]
    return images, labels, names


def _is_for_training(table: Path) -> bool:
    """Hugging Face's names: ``train-00000-of-00004.parquet`` beside ``test-...``, ``train/0000.parquet``."""
    return any(re.match(r"train(?![a-z])", part) for part in table.parts)


def _unpack(parquet: Any, tables: list[Path], pixels: Path, index: Path) -> None:
    """Write both files under other names and rename them when complete: several ranks may do this at once."""
    pixels.parent.mkdir(parents=True, exist_ok=True)
    ends: list[int] = []
    labels: list[int] = []
    end = 0
    with tempfile.TemporaryDirectory(dir=pixels.parent) as folder:
        with (Path(folder) / pixels.name).open("wb") as out:
            for table in tables:
                for images, numbers in _row_groups(parquet, table):
                    for content, number in zip(images, numbers, strict=True):
                        if not content or type(number) is not int or number < 0:
                            raise UserError(
                                f"row {len(ends)} of {table} must hold an image's bytes and a class number, "
                                "0 or more: remove it"
                            )
                        end += out.write(content)
                        ends.append(end)
                        labels.append(number)
        np.savez(Path(folder) / index.name, ends=np.array(ends), labels=np.array(labels))
        os.replace(Path(folder) / pixels.name, pixels)
        os.replace(Path(folder) / index.name, index)


def _row_groups(parquet: Any, table: Path) -> Any:
    """(images' bytes, class numbers) of each row group."""
    try:
        with parquet.ParquetFile(table) as file:
            image, label = _columns(file.schema_arrow, table)
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=[image, label])
                images = rows.column(image).combine_chunks().field("bytes").to_pylist()
                yield images, rows.column(label).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{table} is cut off or no parquet file ({reason}): download it again") from error


def _columns(schema: Any, table: Path) -> tuple[str, str]:
    """The column of images, a struct with bytes, and that of labels."""
    images = [
        field.name for field in schema if field.type.num_fields and field.type.get_field_index("bytes") >= 0
    ]
    labels = [name for name in _LABELS if schema.get_field_index(name) >= 0]
    if not images or not labels:
        raise UserError(
            f"{table} must have a column of images (a struct with bytes, as Hugging Face writes it) and one "
            f"called {', '.join(_LABELS[:-1])} or {_LABELS[-1]}, got {', '.join(schema.names)}"
        )
    return images[0], labels[0]


def _class_names(parquet: Any, table: Path) -> list[str] | None:
    """What Hugging Face notes in the file's metadata about the labels."""
    try:
        schema = parquet.read_schema(table)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{table} is cut off or no parquet file ({reason}): download it again") from error
    _, label = _columns(schema, table)
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])
        return [str(name) for name in noted["info"]["features"][label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pixelmeanflow"
