"""Prints the README's tables from the committed records, so that no figure there is typed by hand.

python benchmarks/readme_table.py            print them
python benchmarks/readme_table.py --write    put them between the README's <!-- table: NAME --> marks
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def attention_table() -> str:
    """Forward + JVP at every shape, forward and backward at one, beside torch's."""
    record = load("bench_attention")
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        cases.setdefault(row["case"], []).append(row)
    lines = [
        f"Medians on {record['device']}, {record['threads']} cores, torch {record['versions']['torch']}:",
        "",
        "| attention (batch, heads, tokens, width) | pmf | torch | times faster |",
        "|---|---|---|---|",
    ]
    for label, (ours, *peers) in cases.items():
        if not (label.startswith("forward + JVP") or label.startswith(("forward (4, 12", "backward (4, 12"))):
            continue
        peer = peers[0]
        name = "func.jvp of math" if "JVP" in label else "flash"
        lines.append(
            f"| {label} | {ours['median_ms']:.1f} ms ({ours['gflop_per_s']:.0f} GFLOP/s) "
            f"| {peer['median_ms']:.1f} ms ({name}) | {peer['time_over_ours']:.1f} |"
        )
    rates = [
        f"{rows[0]['gflop_per_s']:.0f} GFLOP/s in {label.split()[-1]}"
        for label, rows in cases.items()
        if label.startswith("torch GEMM")
    ]
    return "\n".join(
        [*lines, "", f"torch's own 2048^3 matrix product ran at {' and '.join(rates)} in the same run."]
    )


def quality_table() -> str:
    """The three seeds of benchmarks/digits_quality.py, the worst, and two halves of the real set."""
    record = load("digits_quality")
    names = ("accuracy", "frechet", "recall", "coverage")
    rows = [(f"seed {score['seed']}", score) for score in record["seeds"]]
    rows += [("worst", record["worst"]), ("two halves of the real digits", record["real_halves"])]
    lines = [
        f"Ten minutes of training on {record['device']}, {record['threads']} cores; 1797 one-step samples:",
        "",
        "| | recognised as their class | Frechet distance (pixels) | recall | coverage |",
        "|---|---|---|---|---|",
    ]
    for label, figures in rows:
        cells = [f"{figures[name]:.3f}" if name in figures else "" for name in names]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def training_table() -> str:
    """Time, memory and FLOPs of a training step beside the plain port's."""
    record = load("bench_training_step")
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        rows.setdefault(row["part"], []).append(row)
    sizes = record["sizes"]["timed"]
    lines = [
        f"A step on {record['device']}, {record['threads']} cores, torch {record['versions']['torch']}; "
        f"hidden {sizes['hidden_size']}, depth {sizes['depth']}, {sizes['image_size']} pixels, "
        f"batch {record['sizes']['batch_size']}; medians:",
        "",
        "| | pmf | plain PyTorch port | pmf / port |",
        "|---|---|---|---|",
    ]

    def line(label: str, ours: str, port: str, ratio: float) -> None:
        lines.append(f"| {label} | {ours} | {port} | {ratio:.2f} |")

    for precision in ("fp32", "bf16"):
        times = {row["contestant"]: row for row in rows["time"] if row["precision"] == precision}
        ours, port = times["pmf"], times["plain port"]
        for what, key in (
            ("objective, backward and optimizer", "step"),
            ("without the optimizer", "backward"),
        ):
            milliseconds = [f"{side[f'{key}_ms']:.0f} ms" for side in (ours, port)]
            line(f"{precision}: {what}", *milliseconds, port[f"{key}_ratio"])
        peaks = {row["contestant"]: row for row in rows["memory"] if row["precision"] == precision}
        megabytes = [f"{peaks[side]['bytes'] / 2**20:.0f} MB" for side in ("pmf", "plain port")]
        line(f"{precision}: peak memory over the loaded model", *megabytes, peaks["plain port"]["ratio"])
    (flops,) = rows["flops"]
    tera = [f"{flops['flops'][side] / 1e12:.1f} TFLOP" for side in ("ours", "port")]
    line(
        f"objective and backward at depth {flops['depth']}, batch {flops['batch_size']}",
        *tera,
        flops["ratio"],
    )
    without = flops["flops"]["ours"] / flops["flops"]["port, without products with zero tangents"]
    worst = {
        precision: max(row["error"] for row in rows["agreement"] if row["precision"] == precision)
        for precision in ("fp64", "fp32", "bf16")
    }
    return "\n".join([
        *lines,
        "",
        f"FLOPs are those executed, counted; {without:.2f} without the products with zero tangents that "
        "`torch.func.jvp` makes. Losses and every gradient agree in all cases, at worst to "
        f"{worst['fp64']:.0e} (float64), {worst['fp32']:.0e} (fp32) and {worst['bf16']:.0e} (bf16).",
    ])  # fmt: skip


def sampling_table() -> str:
    """Images per second of one-step sampling, and how near the images are."""
    record = load("bench_sampling")
    lines = [
        f"pMF-B/16 in one step on {record['device']}, {record['threads']} cores, "
        f"batch {record['batch_size']}; medians:",
        "",
        "| sampler | images per second | PSNR against the plain sampler |",
        "|---|---|---|",
    ]
    for row in record["rows"]:
        near = "" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
        lines.append(f"| {row['contestant']} | {row['images_per_second']:.2f} | {near} |")
    return "\n".join(lines)


class Table(NamedTuple):
    record: str
    make: Callable[[], str]


TABLES = {
    "attention": Table("bench_attention", attention_table),
    "quality": Table("digits_quality", quality_table),
    "training": Table("bench_training_step", training_table),
    "sampling": Table("bench_sampling", sampling_table),
}


def tables() -> dict[str, str]:
    """Every table whose record has been made, by name."""
    return {
        name: table.make() for name, table in TABLES.items() if (RESULTS / f"{table.record}.json").exists()
    }


def with_tables(readme: str) -> str:
    """The README with the present records' tables between its marks."""
    for name, table in tables().items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        if readme.count(start) != 1:
            raise SystemExit(f"README.md must have one {start.strip()} mark, closed by {end}")
        before, rest = readme.split(start)
        readme = f"{before}{start}{table}\n{end}{rest.partition(end)[2]}"
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="update README.md")
    if parser.parse_args().write:
        readme = ROOT / "README.md"
        readme.write_text(with_tables(readme.read_text()))
    else:
        print("\n\n".join(tables().values()))


if __name__ == "__main__":
    main()
