"""argparse whose errors are UserErrors, and flags generated from the typed training settings."""

import argparse
import os
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pmf.errors import UserError
from pmf.training.config import TrainConfig, flag, settings

Commands = Any  # the return type of add_subparsers() is private to argparse


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError, keeps help text as written and rejects abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, allow_abbrev=False, **options)
        # Python's own from 3.14 on; before, -1e9 is taken for a flag.
        self._negative_number_matcher = re.compile(r"-\.?\d")
        self.register("type", Path, word_by(_path))

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as a UserError, which `pmf.cli.main` prints."""
        raise UserError(f"{message}; see {self.prog} --help")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add one flag per training setting; flags that are not given stay out of the namespace."""
    groups: dict[str, Any] = {}
    defaults = TrainConfig()
    for group, setting in settings():
        section = type(getattr(defaults, group))
        if group not in groups:
            groups[group] = parser.add_argument_group((section.__doc__ or group).strip())
        options: dict[str, Any] = {"help": setting.metadata["help"], "default": argparse.SUPPRESS}
        if setting.metadata["parse"] is not None:
            options.update(type=word_by(setting.metadata["parse"]), metavar=setting.name.upper())
            groups[group].add_argument(flag(setting.name), **options)
            continue
        element, is_tuple = _element_type(typing.get_type_hints(section)[setting.name])
        if element is bool:  # with --no-..., so that a resumed run can turn it off
            options.update(action=argparse.BooleanOptionalAction)
        elif is_tuple:
            options.update(type=element, nargs="+", metavar=element.__name__.upper())
        elif setting.metadata["choices"]:
            options.update(type=element, choices=setting.metadata["choices"])
        else:
            options.update(type=element, metavar=element.__name__.upper())
        groups[group].add_argument(flag(setting.name), **options)


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line, as keyword arguments for `TrainConfig.with_settings`."""
    names = {setting.name for _, setting in settings()}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _path(text: str) -> Path:
    if not text:  # Path("") is the current folder
        raise ValueError("must not be empty; the current folder is .")
    return Path(os.path.expanduser(text))  # shells leave --out=~/runs as it is


def word_by(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` as an argparse type: its ValueError becomes the text after the flag's name."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def _element_type(kind: Any) -> tuple[type, bool]:
    """The type of one command-line word, and whether the setting takes several words."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = [option for option in typing.get_args(kind) if option is not type(None)]
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[0], True
    return kind, False
