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
    folder = checkpoint.newest_checkpoint(run)
    if folder == run:
        raise UserError(f"{run} is a checkpoint, not a run: give the run folder that contains checkpoints/")
    saved = TrainConfig.from_json(checkpoint.read_json(folder / "config.json"))
    config = saved.with_settings(**overrides)
    fixed = {"data": saved.data.data, "seed": saved.run.seed, **dataclasses.asdict(saved.model)}
    fixed |= {name: getattr(saved.optimizer, name) for name in ("optimizer", "ema", "ema_half_lives")}
    for name, value in fixed.items():
        if name in overrides and overrides[name] != value:
            shown = size_in_words(value) if name == "image_size" and value is not None else value
            trained = f"{flag(name)} {shown}" if value is not None else f"its preset's {flag(name)}"
            if isinstance(value, bool):
                trained = flag(name) if value else flag(f"no_{name}")
            raise UserError(f"{run} was trained with {trained}, which cannot change when resuming")
    return config
