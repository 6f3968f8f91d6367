"""Type checks of arguments: booleans, text, infinity and NaN are not numbers."""

import contextlib
import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

__all__ = [
    "are_numbers",
    "as_plain",
    "check_fields",
    "fits",
    "in_words",
    "is_number",
    "is_whole",
    "require_number",
]


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, of Python's or NumPy's types."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, of Python's or NumPy's types."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_plain(value: Any) -> Any:
    """Convert NumPy and PyTorch numbers and arrays to Python's, other sequences to tuples, paths to text."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return tuple(map(as_plain, value))
    return value


def are_numbers(values: Any) -> bool:
    """Whether a value is a sequence of numbers, such as a list, an array or a tensor."""
    values = as_plain(values)
    return isinstance(values, tuple) and all(map(is_number, values))


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


def check_fields(what: str, settings: Any) -> None:
    """Raise ValueError unless a dataclass's fields have their annotated types; `what` begins the sentence.

    Values are converted to Python's own types, so that they can be stored as JSON.
    """
    for name, hint in _hints(settings.__class__).items():
        value = as_plain(getattr(settings, name))
        if not fits(value, hint):
            raise ValueError(f"{what}: {name} must be {in_words(hint)}, got {value!r}")
        object.__setattr__(settings, name, value)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields, except those that only a user's subclass can resolve."""
    hints: dict[str, Any] = {}
    for base in kind.__mro__:
        with contextlib.suppress(NameError):
            hints = typing.get_type_hints(base)
            break
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.name in hints}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the annotated type; a whole number is also a number, true and false are neither."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(value) == len(wanted) and all(map(fits, value, wanted))
    if origin is typing.Literal:
        return value in parts
    if hint is int:
        return is_whole(value)
    if hint is float:
        return is_number(value)
    # A class has the methods of a protocol too, but is not an instance of it.
    return hint is Any or (isinstance(value, origin or hint) and not isinstance(value, type))


_WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    types.NoneType: "empty",
}


def in_words(hint: Any) -> str:
    """An annotation as the end of a sentence, such as "a whole number or empty"."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(in_words, parts))
    if origin is tuple:
        plural = _WORDS[parts[0]].removeprefix("a ") + "s" * (parts[0] is not str)
        return f"a list of {plural}" if parts[-1] is ... else f"{len(parts)} {plural}"
    if origin is typing.Literal:
        return " or ".join(map(repr, parts))
    return _WORDS.get(hint) or f"a {(origin or hint).__name__}"
