"""All measurements on a machine with a GPU, in one command that installs nothing.

    python benchmarks/run_all.py --out DIR [--quick] [--device cuda|cpu]

In this order, within thirty minutes: `pmf check` and the op tests; how many bits a tensor core keeps in a
sum; rates of copies, products and single instructions; attention against its peers, with ncu profiles; its
competing plans (benchmarks/tune.py); Muon, its step as a graph, and compute-sanitizer's race check; a
training step, one-step sampling and all other ops. Timings use triton.testing.do_bench: interleaved, medians.
Each result is shown with its fraction of the copy and matrix rates measured in the same run, and with the
targets set for an H100. Programs not on PATH (nvcc, ncu, compute-sanitizer) are skipped by name.

Each part is a separate process with a time limit. DIR/run_all.json is written after every case, with device,
clocks, driver, versions and command; output of programs goes to DIR/logs. A failure becomes a row with its
error, and the rest continues. --quick takes less than two and a half minutes. --device cpu runs the same
parts on the CPU kernels with tiny sizes: a smoke test, not a measurement.

Exit status: 0; 1 if something of this library failed or was wrong; 2 if there is no such device.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.runner import NO_TIME, NoDeviceError, Runner, failures
from gpu.sections import PARTS

from pmf import _library
from pmf.bench.harness import Row, Scale, command, is_good, versions, write_record
from pmf.bench.pairs import COPY


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for run_all.json")
    parser.add_argument(
        "--quick", action="store_true", help="fewer parts, shapes and dtypes: under two and a half minutes"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="device to test (default: cuda)"
    )
    return parser.parse_args(argv)


def table(record: dict[str, Any]) -> str:
    """The summary for readers: ours, the best peer, fractions, and the targets."""
    lines = [f"{'':14} {'case':46} {'ours ms':>9} {'best peer':>34} {'ratio':>7} {'share':>10}  target"]
    for entry in record["sections"]:
        cases = list(by_case(entry["rows"]))
        checked = [rows[0] for rows in cases if rows[0].get("op", "").startswith("check")]
        if checked:
            right = sum("error" in row and is_good(row) for row in checked)
            late = sum("skipped" in row for row in checked)
            note = f", {late} not checked: {NO_TIME}" if late else ""
            lines.append(f"{entry['name']:14} {right} of {len(checked)} right{note}")
        for rows in cases:
            if rows[0] not in checked or not is_good(rows[0]):
                lines += _case_lines(entry["name"], rows)
    return "\n".join(lines)


def by_case(rows: list[Row]) -> Iterator[list[Row]]:
    """The rows of each case, ours first."""
    for _, group in itertools.groupby(rows, key=lambda row: (row.get("op"), row["case"])):
        yield list(group)


def _case_lines(section: str, rows: list[Row]) -> list[str]:
    ours = rows[0]
    head = f"{section:14} {ours['case']:46}"
    if "failed" in ours or "skipped" in ours:
        return [f"{head} {'FAILED: ' + ours['failed'] if 'failed' in ours else ours['skipped']}"]
    wrong = "" if is_good(ours) else f"  WRONG: error {ours['error']:.1e}, limit {ours['limit']:.1e}"
    if "median_ms" not in ours:
        return [head + wrong + f" {ours.get('said', '')}".rstrip()]
    others = (row for row in rows[1:] if not row["contestant"].startswith(("pmf", COPY)))
    peers = [row for row in others if "median_ms" in row and row.get("right", True)]
    best = min(peers, key=lambda row: row["median_ms"], default=None)
    peer = f"{best['contestant'][:24]:>24} {best['median_ms']:9.3f}" if best else ""
    ratio = f"{best['median_ms'] / ours['median_ms']:6.2f}x" if best else ""
    shares = [
        (ours[f"share_of_{name}_rate"], name)
        for name in ("copy", "matrix")
        if f"share_of_{name}_rate" in ours
    ]
    share = "{:.0%} {}".format(*max(shares)) if shares else ""
    targets = [
        f"{target['target']}: {target['found']}, {_verdict(target['met'])}"
        for target in ours.get("targets", [])
    ]
    first = f"{head} {ours['median_ms']:9.3f} {peer:>34} {ratio:>7} {share:>10}{wrong}"
    return [f"{first}  {targets[0] if targets else ''}".rstrip(), *(" " * 127 + each for each in targets[1:])]


def _verdict(met: bool | None) -> str:
    return "not judged" if met is None else "met" if met else "MISSED"


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if problem := _library.missing():
        print(problem, file=sys.stderr)
        return 2
    on_cpu = arguments.device == "cpu"
    scale: Scale = "tiny" if on_cpu else "quick" if arguments.quick else "full"
    record: dict[str, Any] = {
        "benchmark": "run_all",
        "command": command(),
        "date": time.strftime("%Y-%m-%d"),
        "scale": scale,
        "versions": {**versions(), **peer_versions()},
    }
    path = arguments.out / "run_all.json"
    runner = Runner(arguments.device, scale, record, lambda: write_record(path, record), arguments.out)
    start = time.monotonic()
    try:
        runner.run(PARTS)
    except NoDeviceError as problem:
        print(problem, file=sys.stderr)
        return 2
    record["seconds"] = time.monotonic() - start
    write_record(path, record)
    bad = failures(record)
    meaning = "; sizes of a few numbers: these times mean nothing" if on_cpu else ""
    print(f"\n{record['device']}, {record['seconds']:.0f} s, record in {path}{meaning}\n")
    print(table(record))
    if bad:
        print(f"{len(bad)} results of this library failed or were wrong: see above.", file=sys.stderr)
    return 1 if bad else 0


def peer_versions() -> dict[str, str]:
    """Versions of the possible peers."""
    found = {}
    for name in ("triton", "jvp-flash-attention", "gram-newton-schulz"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    sys.exit(main())
