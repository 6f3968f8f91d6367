"""Fair timing of an op against its peers: correctness first, then all in turn, medians, one record.

A case lists contestants, functions without arguments that do the same work. Before any is timed, each one's
error against float64 is computed; one above the case's limit is marked in the table. Contestants run in turn
within every round, so that a machine whose speed drifts slows all of them alike.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pmf
from pmf import _library, env

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One shape and dtype of one piece of work.

    label: what and where, as a reader should see it.
    contestants: name -> function; the first is this library's.
    errors: name -> relative error against float64, for the contestants whose result is checked.
    limit: largest error that counts as right.
    flops: floating-point operations that the mathematics needs (0: not reported).
    bytes: bytes that must move, each input read once and each output written once (0: not reported).
    """

    label: str
    contestants: Mapping[str, Run]
    errors: Mapping[str, float] = field(default_factory=dict)
    limit: float = float("inf")
    flops: float = 0.0
    bytes: float = 0.0


def relative_error(result: Tensor | tuple[Tensor, ...], exact: Tensor | tuple[Tensor, ...]) -> float:
    """Largest relative Frobenius error over the tensors of a result; NaN counts as infinite."""
    results = (result,) if isinstance(result, Tensor) else result
    exacts = (exact,) if isinstance(exact, Tensor) else exact
    worst = 0.0
    for one, truth in zip(results, exacts, strict=True):
        error = ((one.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def interleaved_medians(
    contestants: Mapping[str, Run], seconds: float, least_rounds: int = 7
) -> dict[str, float]:
    """Median seconds of each contestant over rounds in which every one runs once, for ``seconds`` in all."""
    for run in contestants.values():  # allocate, compile and fill caches outside the clock
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least_rounds:
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def run_case(case: Case, seconds: float) -> list[dict[str, Any]]:
    """Check, time, and describe one case: a row for each contestant."""
    wrong = {name for name, error in case.errors.items() if error > case.limit}
    ours = next(iter(case.contestants))
    medians = interleaved_medians(case.contestants, seconds)
    rows = []
    for name, median in medians.items():
        row: dict[str, Any] = {"case": case.label, "contestant": name, "median_ms": median * 1e3}
        row["time_over_ours"] = median / medians[ours]
        if case.flops:
            row["gflop_per_s"] = case.flops / median / 1e9
        if case.bytes:
            row["gbyte_per_s"] = case.bytes / median / 1e9
        if name in case.errors:
            row["error"] = case.errors[name]
            row["right"] = name not in wrong
        rows.append(row)
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """One table; the last column says how often this library's time fits into the contestant's."""
    print(f"{'case':48} {'contestant':30} {'ms':>9} {'GFLOP/s':>8} {'GB/s':>7} {'error':>9} {'vs ours':>8}")
    for row in rows:
        rate = f"{row['gflop_per_s']:8.0f}" if "gflop_per_s" in row else " " * 8
        moved = f"{row['gbyte_per_s']:7.1f}" if "gbyte_per_s" in row else " " * 7
        error = f"{row['error']:9.1e}" if "error" in row else " " * 9
        note = "" if row.get("right", True) else "  above limit"
        line = f"{row['case']:48} {row['contestant']:30} {row['median_ms']:9.3f} {rate} {moved} {error}"
        print(f"{line} {row['time_over_ours']:7.2f}x{note}", flush=True)


def record(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a claim must cite: device, versions, command and every row."""
    return {
        "benchmark": name,
        "command": _command(),
        "device": env.cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_level": _library.cpu_level(),
        "versions": {"pmf": pmf.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "rows": rows,
    }


def _command() -> str:
    """How this run was asked for: `pmf bench ...` (or python -m pmf), or a script of benchmarks/."""
    program = Path(sys.argv[0])
    name = f"python benchmarks/{program.name}" if program.name.startswith("bench_") else "pmf"
    return " ".join([name, *sys.argv[1:]])


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write one record as JSON, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def run_benchmark(name: str, cases: Callable[[], Any], seconds: float, out: Path | None) -> int:
    """Run every case of one benchmark; the exit status is 1 where this library's own result is wrong."""
    rows: list[dict[str, Any]] = []
    ours_right = True
    for case in cases():
        found = run_case(case, seconds)
        ours_right &= found[0].get("right", True)
        rows += found
    print_rows(rows)
    if out is not None:
        write_record(out / f"bench_{name}.json", record(name, rows))
    return 0 if ours_right else 1
