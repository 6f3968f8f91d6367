"""The log of a run: log.jsonl, loss.png with matplotlib, and TensorBoard events if it is installed."""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pmf import checkpoint, env
from pmf.atomic import write_file
from pmf.errors import UserError
from pmf.training.config import EvaluationSettings, TrainConfig
from pmf.training.pictures import draw_losses
from pmf.version import VERSION

BEST, ENVIRONMENT = "best.json", "environment.json"
_EVERY_ROW = {"step", "images", "seconds"}


class RunLog:
    """Writes one entry at a time and keeps the entries for the plot.

    A resumed run drops the entries after its step, which a killed run wrote after its last checkpoint.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.path = folder, folder / "log.jsonl"
        self.rows = [row for row in read_rows(self.path) if row["step"] <= step]
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        self._file = self.path.open("a", encoding="utf-8")
        self._can_plot = importlib.util.find_spec("matplotlib") is not None
        self._board = _tensorboard(folder, step)

    def add(
        self, step: int, images: int, seconds: float, *, losses: Mapping[str, float], **speed: float
    ) -> None:
        """Log an entry: mean losses since the previous entry, and the speed.

        In TensorBoard the losses are named loss/u, loss/v, ...; everything else keeps its name.
        """
        row = {"step": step, "images": images, "seconds": round(seconds, 3), **losses, **speed}
        self._write(row)
        if self._board is not None:
            for name, value in {**losses, **speed}.items():
                self._board.add_scalar(name.replace("loss_", "loss/"), value, step)

    def add_score(self, step: int, images: int, seconds: float, distance: float) -> None:
        """Log the Frechet distance of samples at this step as a separate entry."""
        self._write(
            {"step": step, "images": images, "seconds": round(seconds, 3), "frechet_distance": distance}
        )
        if self._board is not None:
            self._board.add_scalar("frechet_distance", distance, step)

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def add_picture(self, step: int, grid: torch.Tensor) -> None:
        """Send a uint8 image [C, H, W] to TensorBoard."""
        if self._board is not None:
            self._board.add_image("samples", grid, step)

    def draw_plot(self) -> None:
        """Draw loss.png from all entries so far; a no-op without matplotlib."""
        rows = [row for row in self.rows if "loss_u" in row]
        if self._can_plot and rows:
            columns = [[row[name] for row in rows] for name in ("step", "loss_u", "loss_v")]
            draw_losses(columns[0], columns[1], columns[2], self.folder / "loss.png")

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete entries of a log.jsonl, oldest first, up to a damaged one; none if there is no file."""
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:  # incomplete: the run was killed, or the machine lost power, while it was written
            break
        if not isinstance(row, dict) or not _EVERY_ROW <= row.keys():
            break
        rows.append(row)
    return rows


def read_best(folder: Path, step: int, settings: EvaluationSettings) -> dict[str, Any] | None:
    """The step and distance of a run's best evaluation up to a step, if its checkpoint still exists.

    None as well if it was measured otherwise (other features, reference or number of samples): distances are
    then not comparable, and the next counts as the best.
    """
    path = folder / BEST
    if not path.is_file():
        return None
    best = checkpoint.read_json(path)
    if type(best.get("step")) is not int or not isinstance(best.get("frechet_distance"), (int, float)):
        raise UserError(
            f'{path} must hold the numbers "step" and "frechet_distance": repair it, or delete it and the '
            "next evaluation counts as the best"
        )
    kept = checkpoint.step_folder(folder, best["step"])
    if best["step"] > step or not kept.is_dir():
        return None
    measured = TrainConfig.from_json(checkpoint.read_json(kept / "config.json")).evaluation
    same = dataclasses.replace(measured, evaluate_every=settings.evaluate_every) == settings
    return best if same else None


def add_environment(folder: Path, step: int, device: str, ranks: int) -> None:
    """Add the machine that runs from this step on to environment.json, a list with one entry per start."""
    facts = env.facts()
    entry = {
        "step": step,
        "device": device,
        "ranks": ranks,
        "pixelmeanflow": VERSION,
        **{name: facts[name] for name in ("python", "torch", "processor", "cpu kernels", "gpu", "driver")},
    }
    entries = [old for old in read_environment(folder) if old["step"] < step]
    write_file(folder / ENVIRONMENT, (json.dumps([*entries, entry], indent=2) + "\n").encode())


def read_environment(folder: Path) -> list[dict[str, Any]]:
    """The entries of environment.json, oldest first; none if it is missing or damaged."""
    try:
        entries = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("step"), int)]


def _tensorboard(folder: Path, step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
