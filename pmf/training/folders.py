"""Run folders: creating one, and which settings may change when a run is resumed."""

import dataclasses
from pathlib import Path
from typing import Any

from pmf import checkpoint
from pmf.errors import UserError
from pmf.sizes import size_in_words
from pmf.training.config import TrainConfig, flag


def new_run_folder(parent: Path, name: str) -> Path:
    """Create ``parent/00000-name`` with the first free number."""
    used = [path.name.split("-")[0] for path in parent.glob("*-*")] if parent.is_dir() else []
    number = max((int(head) for head in used if head.isdecimal()), default=-1) + 1
    folder = parent / f"{number:05d}-{name.replace('/', '-')}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot create the run folder {folder}: {error.strerror}") from error
    return folder


def resume_config(run: Path, overrides: dict[str, Any]) -> TrainConfig:
    """The settings of a run's newest checkpoint with overrides; UserError if one would change the weights."""
    saved = _saved_config(run)
    config = saved.with_settings(**overrides)
    if config.data.data != saved.data.data:
        raise _cannot_change(run, "data", saved.data.data)
    refuse_changes(run, config)
    return config


def refuse_changes(run: Path, config: TrainConfig) -> None:
    """UserError if a run to resume was trained with other settings of those that its state is made of.

    Most of them leave every shape as it is: the weights would load, and mean something else.
    """
    before, now = _fixed(_saved_config(run)), _fixed(config)
    for name, value in before.items():
        if now[name] != value:
            raise _cannot_change(run, name, value)


def _saved_config(run: Path) -> TrainConfig:
    folder = checkpoint.newest_checkpoint(run)
    if folder == run:
        raise UserError(f"{run} is a checkpoint, not a run: give the run folder that contains checkpoints/")
    return TrainConfig.from_json(checkpoint.read_json(folder / "config.json"))


def _fixed(config: TrainConfig) -> dict[str, Any]:
    """The settings that cannot change when resuming, by name."""
    others = {name: getattr(config.optimizer, name) for name in ("optimizer", "ema", "ema_half_lives")}
    return {"seed": config.run.seed, **dataclasses.asdict(config.model), **others}


def _cannot_change(run: Path, name: str, value: Any) -> UserError:
    shown = size_in_words(value) if name == "image_size" and value is not None else value
    trained = f"{flag(name)} {shown}" if value is not None else f"its preset's {flag(name)}"
    if isinstance(value, bool):
        trained = flag(name) if value else flag(f"no_{name}")
    return UserError(f"{run} was trained with {trained}, which cannot change when resuming")
