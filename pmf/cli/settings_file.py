"""Settings from a file: a run's config.json, or YAML keyed by flag name."""

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pmf import checkpoint
from pmf.arguments import fits
from pmf.errors import UserError
from pmf.training import PRESETS
from pmf.training.config import TrainConfig, flag, settings, type_of


class FileSettings(NamedTuple):
    """The preset named in a file, if any, and its settings, ready for `TrainConfig.with_settings`."""

    preset: str | None
    settings: dict[str, Any]
    by_hand: bool
    """Whether a user chose these settings: a run's config.json holds all of them."""


def read_settings_file(path: Path) -> FileSettings:
    """Settings from a file.

    A run's config.json contains all settings in groups; flat YAML (or JSON) sets any of them by flag name:
    ``batch-size: 64``. Raises UserError for an unknown name, a name that occurs twice or a value of the wrong
    type.
    """
    content = _read(path)
    if isinstance(content.get("model"), dict) and isinstance(content.get("run"), dict):
        config = TrainConfig.from_json(content)
        name = config.preset if config.preset in PRESETS else None
        every = {s.name: getattr(getattr(config, group), s.name) for group, s in settings()}
        return FileSettings(name, every, by_hand=False)
    known = {setting.name: (setting, type_of(group, setting.name)) for group, setting in settings()}
    chosen: dict[str, Any] = {}
    preset = content.pop("preset", None)
    for word, value in content.items():
        name = str(word).replace("-", "_")
        positive = name.removeprefix("no_")
        if name not in known and positive in known and known[positive][1] is bool:
            if not isinstance(value, bool):
                raise UserError(f"{path}: {flag(name)} must be true or false, got {value!r}")
            name, value = positive, not value
        if name not in known:
            raise UserError(f"{path} sets {word!r}, which is not a setting: see pmf train --help")
        if name in chosen:
            raise UserError(f"{path} sets {flag(name)} twice")
        setting, hint = known[name]
        try:
            chosen[name] = _typed(value, hint, setting.metadata["parse"])
        except ValueError as error:
            raise UserError(f"{path}: {flag(name)} {error}") from error
    return FileSettings(None if preset is None else str(preset), chosen, by_hand=True)


def _read(path: Path) -> dict[str, Any]:
    if (path / "config.json").is_file():
        raise UserError(f"{path} is a folder: give its {path / 'config.json'}")
    if not path.is_file():
        raise UserError(f"there is no settings file {path}")
    if path.suffix == ".json":
        return checkpoint.read_json(path)
    try:
        import yaml
    except ImportError as error:
        raise UserError(f"reading {path} needs PyYAML: pip install pyyaml, or give a .json file") from error
    try:
        text = path.read_text(encoding="utf-8")
        content, tree = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as YAML ({_reason(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must map setting names to values, such as batch-size: 64")
    for word, count in Counter(key.value for key, _ in tree.value).items():  # loaded, the last one wins
        if count > 1:
            raise UserError(f"{path} sets {flag(str(word).replace('_', '-'))} twice")
    return content


def _reason(error: Exception) -> str:
    """What YAML cannot be read, and where, in one line; PyYAML gives several, the problem in the middle."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: {problem}" if mark else str(error).splitlines()[0]


def _typed(value: Any, hint: Any, parse: Callable[[str], Any] | None) -> Any:
    """Convert a YAML value to its setting's type if possible; as in flags, one value can stand for a list.

    YAML 1.1 reads numbers such as 1e-3 as text, and 1.0e+3 is a whole number here.
    """
    value = tuple(value) if isinstance(value, list) else value
    if parse is not None and value is not None and not isinstance(value, bool):
        return parse("x".join(map(str, value)) if isinstance(value, tuple) else str(value))
    choices = (value, (value,)) if not isinstance(value, tuple) else (value,)
    for candidate in (*choices, *map(_numbers, choices)):
        if fits(candidate, hint):
            return candidate
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_numbers, value))
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value
