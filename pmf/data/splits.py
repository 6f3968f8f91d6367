"""Splits of a dataset that lie side by side: one rule for folders, shards and tables.

A name marks the training, validation or test split by one of the words below, as a whole folder name
(``train``, ``val2017``, ``test_images``) or as a word in a file name (``imagenet1k-train-0000.tar``). If
there are several splits, the first in this order is read.
"""

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["SPLITS", "TRAINING", "choose_split", "split_of_file", "split_of_folder"]

TRAINING = "train"
SPLITS = {
    TRAINING: ("train", "training"),
    "validation": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
"""Every split, in order of preference for training, and its words."""

_PART = {word: part for part, words in SPLITS.items() for word in words}
_WORDS = "|".join(sorted(_PART, key=len, reverse=True))
_FOLDER = re.compile(rf"({_WORDS})[-_ ]?(?:set|split|data|images?|imgs?)?[-_ ]?\d*", re.IGNORECASE)
_FILE = re.compile(rf"(?<![a-z])({_WORDS})(?![a-z])", re.IGNORECASE)

Item = TypeVar("Item")


def split_of_folder(name: str) -> str | None:
    """The split that a folder name indicates, or None."""
    match = _FOLDER.fullmatch(name)
    return _PART[match[1].lower()] if match else None


def split_of_file(path: str) -> str | None:
    """The split that a shard's or table's file name or folders indicate, or None."""
    *folders, name = path.split("/")
    match = _FILE.search(name)
    return _PART[match[1].lower()] if match else next(filter(None, map(split_of_folder, folders[::-1])), None)


def choose_split(
    items: Sequence[Item], split_of: Callable[[Item], str | None]
) -> tuple[str | None, list[Item], list[Item]]:
    """The first split present, or None if there is none; its items, and the items left out.

    Items of no split count as training items if there are no others, and are otherwise left out.
    """
    parts = [split_of(item) for item in items]
    if not any(parts):
        return None, list(items), []
    if TRAINING not in parts:
        parts = [part or TRAINING for part in parts]
    chosen = next(part for part in SPLITS if part in parts)
    pairs = list(zip(items, parts, strict=True))
    taken = [item for item, part in pairs if part == chosen]
    return chosen, taken, [item for item, part in pairs if part != chosen]
