"""Prints the README's tables from the committed records, so that no figure there is typed by hand.

python benchmarks/readme_table.py            print them
python benchmarks/readme_table.py --write    put them between the README's <!-- table: NAME --> marks
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

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


TABLES = {"attention": attention_table, "quality": quality_table}


def with_tables(readme: str) -> str:
    """The README with the present records' tables between its marks."""
    for name, make in TABLES.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        if readme.count(start) != 1:
            raise SystemExit(f"README.md must have one {start.strip()} mark, closed by {end}")
        before, rest = readme.split(start)
        readme = f"{before}{start}{make()}\n{end}{rest.partition(end)[2]}"
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
        print("\n\n".join(make() for make in TABLES.values()))


if __name__ == "__main__":
    main()
