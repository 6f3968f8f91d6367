"""Checks of numbers among arguments: True and False, text, infinity and NaN are not numbers."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

__all__ = ["are_numbers", "is_number", "is_whole", "require_number"]


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, of Python's or NumPy's types."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, of Python's or NumPy's types."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def are_numbers(values: Any) -> bool:
    """Whether a value is a sequence of numbers, such as a list or an array."""
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__getitem__"):
        return False
    try:
        return all(map(is_number, values))
    except TypeError:  # an array of no dimensions
        return False


def require_number(
    name: str,
    value: Any,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raise ValueError unless the value is a number within the bounds; `name` begins the sentence."""
    if is_number(value) and at_least <= value <= at_most and above < value < below:
        return
    bounds = (("at least", at_least), ("greater than", above), ("at most", at_most), ("less than", below))
    limits = " and ".join(f"{words} {bound:g}" for words, bound in bounds if math.isfinite(bound))
    raise ValueError(f"{name} must be a finite number{', ' * bool(limits)}{limits}, got {value!r}")
