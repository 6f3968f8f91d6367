"""The results of a study: a Markdown table, the same as JSON, and a plot."""

import importlib.util
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pmf.ablation.study import CLASSIFIER
from pmf.ablation.suites import Growth, Ordering
from pmf.atomic import write_file
from pmf.errors import UserError
from pmf.pictures import new_figure, png_of

__all__ = ["decimals", "judge_orderings", "summarise", "write_report"]

Rows = Sequence[Mapping[str, Any]]


def summarise(rows: Rows, variants: Sequence[str]) -> list[dict[str, Any]]:
    """Per variant: its seeds, and the mean and standard deviation of every score over them."""
    summary = []
    for variant in variants:
        own = [row for row in rows if row["variant"] == variant]
        line: dict[str, Any] = {"variant": variant, "seeds": [row["seed"] for row in own]}
        for figure in ("frechet", "frechet_pixels", "recognised", "seconds", "training_seconds"):
            values = [row[figure] for row in own]
            line[figure] = {"mean": statistics.fmean(values), "each": values}
            line[figure]["sd"] = statistics.stdev(values) if len(values) > 1 else math.nan
        summary.append(line)
    return [_without_nan(line) for line in summary]


def judge_orderings(rows: Rows, orderings: Sequence[Ordering | Growth]) -> list[dict[str, Any]]:
    """Evaluate each claim whose variants were run: the numbers, and whether it holds, overall and by seed.

    holds: "yes" (for the mean and every seed), "in the mean" (for the mean only) or "no".
    """
    distance: dict[str, dict[int, float]] = {}
    for row in rows:
        distance.setdefault(row["variant"], {})[row["seed"]] = row["frechet"]
    judged = []
    for ordering in orderings:
        names = _variants_of(ordering)
        if not all(name in distance for name in names):
            continue
        seeds = sorted(set.intersection(*(set(distance[name]) for name in names)))
        if isinstance(ordering, Growth):
            ratios = {
                seed: [distance[worse][seed] / distance[better][seed] for better, worse in ordering.pairs]
                for seed in seeds
            }
            means = [statistics.fmean(column) for column in zip(*ratios.values(), strict=True)]
            good = [all(a < b for a, b in zip(row, row[1:], strict=False)) for row in ratios.values()]
            in_mean = all(a < b for a, b in zip(means, means[1:], strict=False))
            numbers = " < ".join(f"{ratio:.2f}" for ratio in means) if in_mean else _list(means)
            numbers = f"ratios {numbers}"
        else:
            better, worse = (distance[name] for name in names)
            good = [better[seed] < worse[seed] for seed in seeds]
            means = [statistics.fmean(side[seed] for seed in seeds) for side in (better, worse)]
            in_mean = means[0] < means[1]
            digits = decimals(min(means))
            numbers = f"{means[0]:.{digits}f} against {means[1]:.{digits}f}"
        verdict = "yes" if in_mean and all(good) else "in the mean" if in_mean else "no"
        judged.append(
            {
                "claim": ordering.claim,
                "variants": list(names),
                "means": means,
                "numbers": numbers,
                "seeds_that_agree": sum(good),
                "seeds": len(seeds),
                "holds": verdict,
            }
        )
    return judged


def write_report(out: Path, record: Mapping[str, Any]) -> list[Path]:
    """Write table.md, record.json and, if matplotlib is installed, plot.png; returns the paths."""
    files = {
        "table.md": _table(record).encode(),
        "record.json": (json.dumps(record, indent=2) + "\n").encode(),
    }
    if importlib.util.find_spec("matplotlib") is not None:
        files["plot.png"] = _plot(record)
    for name, content in files.items():
        try:
            write_file(out / name, content)
        except OSError as error:
            raise UserError(f"cannot write {out / name}: {error.strerror or error}") from error
    return [out / name for name in files]


def _table(record: Mapping[str, Any]) -> str:
    """The record as a Markdown page."""
    metric = record["metric"]
    space, digits = metric["features"], decimals(min(line["frechet"]["mean"] for line in record["variants"]))
    lines = [
        f"# Ablations on {record['data']}",
        "",
        f"`{record['command']}`",
        "",
        f"{record['device']}, {record['threads']} thread{'s' * (record['threads'] > 1)}; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + f"; {record['seconds'] / 60:.1f} minutes for {record['runs']} runs of {record['steps']} steps in "
        f"batches of {record['batch_size']}.",
        "",
        f"Frechet distance: {metric['samples']} one-step samples against as many real images, in "
        f"{_features_of(space)}, and in pixels; neither is FID. Recognised: samples that a classifier of "
        f"this data (right for {metric['judge_accuracy']:.1%} of held-out images) assigns to the requested "
        "class. Mean ± standard deviation over the seeds.",
        "",
        f"| variant | Frechet ({space}) | Frechet (pixels) | recognised | seeds | seconds a run |",
        "|---|---|---|---|---|---|",
    ]
    for line in record["variants"]:
        distance = f"{_spread(line['frechet'], digits)} | {_spread(line['frechet_pixels'], 2)}"
        lines.append(
            f"| {line['variant']} | {distance} | {_spread(line['recognised'], 3)} | "
            f"{len(line['seeds'])} | {line['seconds']['mean']:.0f} |"
        )
    if real := metric["real_images"]:
        lines.append(
            f"| other real images | {real['frechet']:.{digits}f} | {real['frechet_pixels']:.2f} | "
            f"{real['recognised']:.3f} | | |"
        )
    if record["orderings"]:
        lines += ["", f"| claim | Frechet ({space}) | seeds that agree | holds |", "|---|---|---|---|"]
        for one in record["orderings"]:
            agree = f"{one['seeds_that_agree']} of {one['seeds']}"
            lines.append(f"| {one['claim']} | {one['numbers']} | {agree} | {one['holds']} |")
    lines += ["", "What each variant changes:", ""]
    for line in record["variants"]:
        lines.append(f"- {line['variant']}: {_settings(line['settings'])}")
    return "\n".join(lines) + "\n"


def _plot(record: Mapping[str, Any]) -> bytes:
    """A PNG with a dot per seed and a bar at the mean, best variant at the top."""
    lines = sorted(record["variants"], key=lambda line: line["frechet"]["mean"], reverse=True)
    base = record["variants"][0]
    figure = new_figure(8, 1.2 + 0.3 * len(lines))
    axes = figure.add_subplot()
    for height, line in enumerate(lines):
        colour = "tab:orange" if line["variant"] == base["variant"] else "tab:blue"
        axes.plot(line["frechet"]["each"], [height] * len(line["seeds"]), "o", color=colour, alpha=0.5)
        axes.plot(line["frechet"]["mean"], height, "|", color=colour, markersize=16, markeredgewidth=2)
    axes.axvline(base["frechet"]["mean"], color="tab:orange", linewidth=1, alpha=0.5)
    space = record["metric"]["features"]
    axes.set(xscale="log", xlabel=f"Frechet distance ({space}) of one-step samples; smaller is better")
    axes.set_yticks(range(len(lines)), [line["variant"] for line in lines])
    axes.set_title(f"{record['data']}, {record['steps']} steps, {len(base['seeds'])} seeds", fontsize=10)
    axes.grid(True, axis="x", which="both", alpha=0.2)
    return png_of(figure)


def decimals(distance: float) -> int:
    """Digits after the point for a distance: two, or more if that is fewer than three significant ones."""
    return max(2, 2 - math.floor(math.log10(distance))) if 0 < distance < math.inf else 2


def _features_of(space: str) -> str:
    if space == CLASSIFIER:
        return "the 64 features of a classifier trained on this data"
    return f"the features of `pmf evaluate --features {space}`"


def _variants_of(ordering: Ordering | Growth) -> list[str]:
    if isinstance(ordering, Ordering):
        return [ordering.better, ordering.worse]
    return [name for pair in ordering.pairs for name in pair]


def _spread(figure: Mapping[str, Any], digits: int) -> str:
    spread = "" if figure["sd"] is None else f" ± {figure['sd']:.{digits}f}"
    return f"{figure['mean']:.{digits}f}{spread}"


def _settings(settings: Mapping[str, Any]) -> str:
    return (
        ", ".join(f"{name} {_value(value)}" for name, value in settings.items()) or "nothing, it is the base"
    )


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "the model's own" if value is None else str(value)


def _list(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.2f}" for number in numbers)


def _without_nan(line: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN by null for JSON: the deviation over a single seed."""
    for value in line.values():
        if isinstance(value, dict) and math.isnan(value["sd"]):
            value["sd"] = None
    return line
