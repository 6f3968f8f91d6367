"""The report of ``pmf report``: a run in one HTML file that needs no network and no other file."""

import base64
import html
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pmf import checkpoint
from pmf.checkpoint import sharded
from pmf.errors import UserError, first_few
from pmf.models import ModelConfig, PixelMeanFlow
from pmf.pictures import new_figure
from pmf.training.config import TrainConfig, flag, settings
from pmf.training.log import read_best, read_environment, read_rows
from pmf.training.presets import PRESETS

__all__ = ["write_report"]

_GRIDS = 8  # grids drawn during training that are shown, evenly spaced
_GRID_SIDE, _LAST_SIDE = 480, 1024  # larger pictures are reduced to this many pixels
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
.state { color: #666; margin-top: 0 }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem }
.curves svg { width: 100%; height: auto }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { color: #666; text-align: center; font-size: 0.85rem }
img { width: 100% } .last { margin-bottom: 1.5rem } .last img { width: auto; max-width: 100% }
.last figcaption { text-align: left }
table { border-collapse: collapse } td { padding: 0.1rem 1.5rem 0.1rem 0; vertical-align: top }
td:first-child { color: #666; white-space: nowrap } .changed td:last-child { font-weight: 600 }
.settings { columns: 26rem } .settings section { break-inside: avoid }
h3 { font-size: 1rem; margin: 1rem 0 0.2rem }
.missing { align-self: start; background: #fff6e0; border-left: 3px solid #e0a800; padding: 0.4rem 0.8rem }
"""
Row = dict[str, Any]


def write_report(run: Path) -> str:
    """The report as HTML; writes nothing. UserError if the folder is not a run.

    A run without log, samples or record of its machine, or one that has not finished, is reported with a
    sentence about what is missing.
    """
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is not a run: it has no config.json; give a folder written by pmf train")
    config = TrainConfig.from_json(checkpoint.read_json(run / "config.json"))
    rows = read_rows(run / "log.jsonl")
    name = run.resolve().name
    parts = [
        f"<h1>{html.escape(name)}</h1>",
        f'<p class="state">{html.escape(_state(config, rows))}</p>',
        "<h2>Overview</h2>",
        _table(_overview(run, config, rows)),
        "<h2>Samples</h2>",
        *_samples(run, config),
        "<h2>Curves</h2>",
        *_curves(config, rows),
        "<h2>Environment</h2>",
        *_environment(run),
        "<h2>Settings</h2>",
        *_settings(config),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{html.escape(name)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _state(config: TrainConfig, rows: Sequence[Row]) -> str:
    """The run's progress, in words."""
    step, seconds = (rows[-1]["step"], rows[-1]["seconds"]) if rows else (0, 0.0)
    spent = [step / config.run.steps] if config.run.steps else []
    spent += [seconds / (60 * config.run.minutes)] if config.run.minutes else []
    fraction = max(spent, default=0.0)
    if fraction >= 1:
        return f"Finished after {step:,} steps."
    return f"Not finished: {math.floor(100 * fraction)}% done at step {step:,}, the last in the log."


def _overview(run: Path, config: TrainConfig, rows: Sequence[Row]) -> list[tuple[str, str]]:
    found = [("preset", config.preset), ("data", config.data.data)]
    folders = checkpoint.checkpoint_folders(run)
    if folders:
        model, names = _model_of(folders[-1])
        with torch.device("meta"):
            network = PixelMeanFlow(model)
        sampling = sum(p.numel() for n, p in network.named_parameters() if not n.startswith("v_"))
        everything = sum(p.numel() for p in network.parameters())
        colour = "grey" if model.channels == 1 else "colour"
        found += [
            ("classes", first_few(names, 12)),
            ("images", f"{' x '.join(map(str, model.image_shape[1:]))}, {colour}"),
            ("parameters", f"{sampling / 1e6:.2f} M to sample, {everything / 1e6:.2f} M in training"),
        ]
    found.append(("newest checkpoint", folders[-1].name if folders else "none yet"))
    if rows:
        found += _speed(rows)
    if best := _best(run, config, rows):
        found.append(("best distance", f"{best['frechet_distance']:.4g} at step {best['step']:,}"))
    return found


def _best(run: Path, config: TrainConfig, rows: Sequence[Row]) -> Row | None:
    """Not the least distance in the log: evaluation may have been set otherwise before."""
    try:
        return read_best(run, rows[-1]["step"] if rows else 0, config.evaluation)
    except UserError:  # a damaged file says nothing
        return None


def _model_of(folder: Path) -> tuple[ModelConfig, list[str]]:
    if sharded.is_sharded(folder):
        header = sharded.read_header(folder)
    else:
        _, header = checkpoint.read_tensors(folder / "weights.safetensors", skip=("",))  # no tensor
    return checkpoint.described_model(header, folder)


def _speed(rows: Sequence[Row]) -> list[tuple[str, str]]:
    last, speeds = rows[-1], _column(rows, "images_per_second")
    found = [
        ("images seen", f"{last['images']:,}"),
        ("training time", _duration(last["seconds"])),
    ]
    if speeds:
        found.append(("images per second", f"{statistics.median(speeds):.4g} (median)"))
    if waiting := _column(rows, "waiting_for_data"):
        found.append(("waiting for data", f"{statistics.fmean(waiting):.1%} of the time"))
    if memory := _column(rows, "memory_mib"):
        found.append(("peak memory", f"{max(memory):,.0f} MiB"))
    for name in ("loss_u", "loss_v"):
        if values := _column(rows, name):
            found.append((f"last {name}", f"{values[-1]:.4g}"))
    return found


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows if name in row]


def _samples(run: Path, config: TrainConfig) -> list[str]:
    grids = sorted(path for path in (run / "samples").glob("*.png") if path.stem.isdecimal())
    parts = []
    if (run / "samples.png").is_file():
        parts.append(_figure(run / "samples.png", "the newest weights", _LAST_SIDE, "last"))
    if not grids and not parts:
        every = config.sampling.sample_every
        parts.append(_missing(f"No samples yet: the first grid is drawn at step {every:,} or at the end."))
    if len(grids) > _GRIDS:
        chosen = torch.linspace(0, len(grids) - 1, _GRIDS, dtype=torch.float64, device="cpu").round().long()
        grids = [grids[i] for i in chosen.tolist()]
    if grids:
        figures = [_figure(path, f"step {int(path.stem):,}", _GRID_SIDE) for path in grids]
        parts += ['<div class="grids">', *figures, "</div>"]
    return parts


def _figure(path: Path, caption: str, side: int, kind: str = "") -> str:
    try:
        with Image.open(path) as image:
            image.load()
            content = io.BytesIO()
            if max(image.size) > side:
                image.thumbnail((side, side), Image.Resampling.BOX)
            image.save(content, format="PNG")
    except (OSError, SyntaxError, ValueError) as error:  # whatever Pillow raises for damaged files
        return _missing(f"{path.name} cannot be read ({error}).")
    source = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    picture = f'<img src="{source}" alt="{caption}">'
    return f'<figure class="{kind}">{picture}<figcaption>{caption}</figcaption></figure>'


def _curves(config: TrainConfig, rows: Sequence[Row]) -> list[str]:
    losses = [row for row in rows if "loss_u" in row]
    if not losses:
        return [_missing(f"The log is empty: its first entry is at step {config.run.log_every:,}.")]
    parts = ['<div class="curves">', _curve(losses, "loss", ("loss_u", "loss_v", "loss_perceptual"), "log")]
    for title, names, scale in (
        ("gradient norm", ("grad_norm",), "log"),
        ("learning rate", ("lr",), "linear"),
        ("images per second", ("images_per_second",), "linear"),
    ):
        if _column(losses, names[0]):
            parts.append(_curve(losses, title, names, scale))
        else:
            parts.append(_missing(f"The log has no {title}."))
    if scores := [row for row in rows if "frechet_distance" in row]:
        parts.append(_curve(scores, "Frechet distance of samples", ("frechet_distance",), "linear"))
    return [*parts, "</div>"]


def _curve(rows: Sequence[Row], title: str, names: Sequence[str], scale: str) -> str:
    """An SVG of some columns by step."""
    figure = new_figure(5, 3)
    axes = figure.add_subplot()
    for name in names:
        points = [(row["step"], row[name]) for row in rows if row.get(name)]  # a term without weight is 0
        if points:
            axes.plot(
                *zip(*points, strict=True), label=name, linewidth=1.2, marker="." if len(points) < 3 else ""
            )
    axes.set(xlabel="step", title=title, yscale=scale)
    axes.grid(True, alpha=0.25)
    if len(names) > 1:
        axes.legend(frameon=False)
    elif scale == "linear":
        axes.set_ylim(bottom=0, top=1.1 * max(max(_column(rows, name), default=1.0) for name in names))
    content = io.StringIO()
    figure.savefig(
        content, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = content.getvalue()
    return text[text.index("<svg") :]


def _environment(run: Path) -> list[str]:
    entries = read_environment(run)
    if not entries:
        return [_missing("The machine was not recorded: environment.json is missing.")]
    parts = []
    for entry in entries:
        if len(entries) > 1:
            parts.append(f"<h3>From step {entry['step']:,}</h3>")
        parts.append(_table([(key, str(value)) for key, value in entry.items() if key != "step"]))
    return parts


def _settings(config: TrainConfig) -> list[str]:
    preset = PRESETS.get(config.preset)
    words = "Bold: differs from the preset." if preset else ""
    parts, group = [f"<p>{words}</p>" if words else "", '<div class="settings">'], ""
    for name, setting in settings():
        if name != group:
            parts += ["</table></section>" if group else "", f"<section><h3>{name}</h3><table>"]
            group = name
        value = getattr(getattr(config, name), setting.name)
        changed = preset is not None and value != getattr(getattr(preset, name), setting.name)
        parts.append(_line(flag(setting.name), _word(value), changed))
    return [*parts, "</table></section></div>"]


def _word(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _table(lines: Sequence[tuple[str, str]]) -> str:
    return "<table>" + "".join(_line(name, value) for name, value in lines) + "</table>"


def _line(name: str, value: str, changed: bool = False) -> str:
    kind = ' class="changed"' if changed else ""
    return f"<tr{kind}><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"


def _missing(sentence: str) -> str:
    return f'<p class="missing">{html.escape(sentence)}</p>'
