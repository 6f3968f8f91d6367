"""Settings from a file: a run's config.json, or YAML with the names of the flags."""

from pathlib import Path
from typing import Any

from pmf import checkpoint
from pmf.errors import UserError
from pmf.training import PRESETS
from pmf.training.config import TrainConfig, flag, settings


def read_settings_file(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The preset that a file names, if it does, and its settings, ready for `TrainConfig.with_settings`.

    A run's config.json holds all settings in groups; YAML (or JSON) of one level names any of them, as the
    command line does: ``batch-size: 64``. Raises UserError for an unknown name or a value of a wrong type.
    """
    content = _read(path)
    if isinstance(content.get("model"), dict) and isinstance(content.get("run"), dict):
        config = TrainConfig.from_json(content)
        name = config.preset if config.preset in PRESETS else None
        return name, {s.name: getattr(getattr(config, group), s.name) for group, s in settings()}
    known = {setting.name: setting for _, setting in settings()}
    chosen: dict[str, Any] = {}
    preset = content.pop("preset", None)
    for word, value in content.items():
        name = str(word).replace("-", "_")
        if name not in known:
            raise UserError(f"{path} sets {word!r}, which is no setting: pmf train --help lists them all")
        parse = known[name].metadata["parse"]
        try:
            chosen[name] = parse(str(value)) if parse is not None and value is not None else _typed(value)
        except ValueError as error:
            raise UserError(f"{path}: {flag(name)} {error}") from error
    return None if preset is None else str(preset), chosen


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no settings file {path}")
    if path.suffix == ".json":
        return checkpoint.read_json(path)
    try:
        import yaml
    except ImportError as error:
        raise UserError(f"reading {path} needs PyYAML: pip install pyyaml, or give a .json file") from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold settings by name, such as batch-size: 64")
    return content


def _typed(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a word."""
    if isinstance(value, list):
        return tuple(map(_typed, value))
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
