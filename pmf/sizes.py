"""Image sizes: one number for squares, otherwise (height, width); HEIGHTxWIDTH as text."""

import operator
import re
from collections.abc import Sequence
from typing import SupportsIndex

__all__ = ["Size", "height_and_width", "normal_size", "parse_size", "size_in_words"]

Size = int | tuple[int, int]


def height_and_width(size: SupportsIndex | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size; ValueError unless it is one or two integers of at least 1."""
    try:
        numbers = (size, size) if isinstance(size, SupportsIndex) else tuple(size)
        height, width = (operator.index(number) for number in numbers)
    except (TypeError, ValueError):
        height = width = 0
    if isinstance(size, bool) or min(height, width) < 1:
        raise ValueError(f"must be a number of at least 1 or two of them (height, width), got {size!r}")
    return height, width


def normal_size(size: SupportsIndex | Sequence[int]) -> Size:
    """The canonical form of a size, a number for squares, so that equal sizes compare equal."""
    height, width = height_and_width(size)
    return height if height == width else (height, width)


def parse_size(text: str) -> Size:
    """Parse ``32`` or ``32x64`` (height first); ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,9})(?:[xX](\d{1,9}))?", text.strip())
    if match is None:
        raise ValueError(f"must be a number or HEIGHTxWIDTH such as 32x64, got {text!r}")
    return normal_size((int(match[1]), int(match[2] or match[1])))


def size_in_words(size: SupportsIndex | Sequence[int]) -> str:
    """The size as text, such as ``32x64``."""
    return "{}x{}".format(*height_and_width(size))
