"""Variants of a run: a name, and the settings that differ from the base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pmf.errors import UserError
from pmf.training.config import EvaluationSettings, flag, settings

# Settings shared by all variants of a study, so that scores are comparable.
SHARED = ("data", "image_size", "channels", "steps", "minutes", "seed", "device")
_OF_FOLDERS = ("checkpoint_every", "keep_checkpoints", "sample_every")
_IN_NAMES = " .,-_/+="


@dataclass(frozen=True)
class Variant:
    """A row of the table: ``Variant("adam", {"optimizer": "adam"})``."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name.strip() or not all(letter.isalnum() or letter in _IN_NAMES for letter in self.name):
            raise UserError(
                f"a variant's name may contain letters, digits, spaces and {_IN_NAMES!r}, got {self.name!r}"
            )
        known = {setting.name for _, setting in settings()}
        for name in self.settings:
            if name not in known:
                raise UserError(f"variant {self.name!r}: there is no setting {flag(name)}")
            if name in SHARED:
                raise UserError(
                    f"variant {self.name!r} changes {flag(name)}, which all variants share: "
                    "set it for the whole study"
                )
            if why := why_unread_in_studies(name):
                raise UserError(f"variant {self.name!r}: {why}")

    @property
    def stem(self) -> str:
        """The prefix of its file names."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)


def why_unread_in_studies(name: str) -> str | None:
    """What to say about a setting that has no effect in a study; None for the others.

    A study keeps scores instead of run folders, and has its own measure.
    """
    if name in _OF_FOLDERS or name in {setting.name for setting in fields(EvaluationSettings)}:
        return f"{flag(name)} has no effect in a study, which keeps no run folders: leave it out"
    return None


def check_names(variants: Sequence[Variant]) -> None:
    """Raise UserError if there is no variant or two would share files."""
    if not variants:
        raise UserError("there is nothing to compare: give --suite, --variant or --variants")
    stems = [variant.stem for variant in variants]
    for variant in variants:
        if stems.count(variant.stem) > 1:
            raise UserError(f"two variants would share the files of {variant.name!r}: rename one of them")
