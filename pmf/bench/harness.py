"""Fair timing of an op against its peers: correctness first, then interleaved runs, medians, one record.

A case lists contestants, functions without arguments that do the same work. Before timing, each contestant's
error against float64 is computed; one above the case's limit is marked in the table, and one that raises is
listed with its message. Contestants are interleaved within every round, so that drifts in machine speed
affect all of them alike.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import pmf
from pmf.bench.device import Device, Run
from pmf.check.tolerance import relative_error

Row = dict[str, Any]
Scale = Literal["tiny", "cpu", "quick", "full"]

_LIBRARY = "pmf"  # in the names of contestants that are this library's, also where they are not the first
PEER_SLACK = 4.0
"""A peer counts as correct up to this many times our limit: it may round more often, not compute less."""


@dataclass(frozen=True)
class Setting:
    """Device and scale: "cpu" and "full" are the scales of `pmf bench` on a processor and on a GPU."""

    device: Device
    scale: Scale

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device.device).manual_seed(seed)

    def normal(
        self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> list[Tensor]:
        """Standard normal tensors on the device."""
        generator, device = self.generator(seed), self.device.device
        return [torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes]


@dataclass(frozen=True)
class Case:
    """One shape and dtype of a piece of work, with its inputs.

    contestants: name -> function; the first is ours.
    error: name -> relative error of that contestant's result against float64; None, for all or for one:
        nothing to check.
    limit: largest error that counts as correct.
    flops: necessary floating-point operations (0: not reported).
    bytes: bytes that must move, each input read once and each output written once (0: not reported).
    timed: False for a correctness check only.
    figures: further results, copied into our row.
    """

    contestants: Mapping[str, Run]
    error: Callable[[str], float | None] | None = None
    limit: float = float("inf")
    flops: float = 0.0
    bytes: float = 0.0
    timed: bool = True
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """A case before its inputs are created.

    label: op and shape, for readers.
    facts: the same for programs (op, shape, dtype), copied into every row.
    """

    label: str
    build: Callable[[], Case]
    facts: Mapping[str, Any] = field(default_factory=dict)


class DeviceLostError(RuntimeError):
    """The device no longer responds, so nothing later in this process can be trusted."""


def against(
    contestants: Mapping[str, Run], exact: Any, part: Callable[[Any], Any] = lambda result: result
) -> Callable[[str], float]:
    """The errors of the contestants' results; `part` selects the elements that `exact` contains."""
    return lambda name: relative_error(part(contestants[name]()), exact)


def run_case(planned: Planned, device: Device, seconds: float) -> list[Row]:
    """Check and time a case; returns a row per contestant.

    A row has "failed", a message, if the contestant raised. Raises DeviceLostError after a failure from which
    the device does not recover.
    """
    base = {"case": planned.label, **planned.facts}
    failed: dict[str, str] = {}
    errors: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    try:
        case = planned.build()
    except Exception as problem:
        _check_alive(device, problem)
        return [{**base, "contestant": "pmf", "ours": True, "failed": sentence(problem)}]
    for name, run in case.contestants.items():
        try:
            device.poison()
            error = None if case.error is None else case.error(name)
            if error is None:
                run()
            else:
                errors[name] = error
            device.settle()
        except Exception as problem:
            _check_alive(device, problem)
            failed[name] = sentence(problem)
    ours = next(iter(case.contestants))
    if case.timed:
        willing = {name: run for name, run in case.contestants.items() if name not in failed}
        try:
            times = device.times(willing, seconds)
        except Exception as problem:
            _check_alive(device, problem)
            times = _times_alone(willing, device, seconds / len(willing), failed)
    rows = []
    for name in case.contestants:
        row: Row = {
            **base,
            "contestant": name,
            "ours": name == ours,
            **(case.figures if name == ours else {}),
        }
        if name in failed:
            rows.append({**row, "failed": failed[name]})
            continue
        if name in errors:
            limit = case.limit * (1 if name == ours or _LIBRARY in name else PEER_SLACK)
            row |= {"error": errors[name], "limit": limit, "right": errors[name] <= limit}
        if name in times:
            row |= _time_row(case, times[name])
            if ours in times:
                row["time_over_ours"] = row["median_ms"] / 1e3 / statistics.median(times[ours])
        rows.append(row)
    return rows


def _times_alone(
    contestants: Mapping[str, Run], device: Device, seconds: float, failed: dict[str, str]
) -> dict[str, list[float]]:
    """After a failure of interleaved timing: time each separately, so that failures affect no others."""
    times: dict[str, list[float]] = {}
    for name, run in contestants.items():
        try:
            times |= device.times({name: run}, seconds)
        except Exception as problem:
            _check_alive(device, problem)
            failed[name] = f"while timed: {sentence(problem)}"
    return times


def _time_row(case: Case, times: list[float]) -> Row:
    median = statistics.median(times)
    row: Row = {"median_ms": median * 1e3, "runs": len(times)}
    if len(times) > 1:
        low, _, high = statistics.quantiles(times, n=4)
        row["quartiles_ms"] = [low * 1e3, high * 1e3]
    if case.flops:
        row |= {"flops": case.flops, "gflop_per_s": case.flops / median / 1e9}
    if case.bytes:
        row |= {"bytes": case.bytes, "gbyte_per_s": case.bytes / median / 1e9}
    return row


def sentence(problem: BaseException) -> str:
    """The first line of an exception's message, with its type."""
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0]}" if lines else type(problem).__name__


def _check_alive(device: Device, problem: Exception) -> None:
    try:
        device.settle()
    except Exception:
        raise DeviceLostError(sentence(problem)) from problem


def is_good(row: Row) -> bool:
    """Whether a row raises no doubt about this library: peers may fail, our other forms may not."""
    is_peer = not row.get("ours") and _LIBRARY not in row.get("contestant", "")
    return is_peer or ("failed" not in row and row.get("right", True))


def print_rows(rows: Iterable[Row]) -> None:
    """Print a table; the last column is the contestant's time over ours."""
    print(f"{'case':48} {'contestant':30} {'ms':>9} {'GFLOP/s':>8} {'GB/s':>7} {'error':>9} {'vs ours':>8}")
    for row in rows:
        print(row_line(row), flush=True)


def row_line(row: Row) -> str:
    """A row of `print_rows`' table."""
    what = f"{row['case']:48} {row['contestant']:30}"
    if "failed" in row:
        return f"{what} failed: {row['failed']}"
    if note := row.get("skipped", row.get("said")):
        return f"{what} {note}"

    def cell(key: str, form: str) -> str:
        return format(row[key], form) if key in row else " " * int(form.split(".")[0])

    note = "" if row.get("right", True) else "  above limit"
    ratio = f"{row['time_over_ours']:7.2f}x" if "time_over_ours" in row else ""
    cells = (("median_ms", "9.3f"), ("gflop_per_s", "8.0f"), ("gbyte_per_s", "7.1f"), ("error", "9.1e"))
    return f"{what} {' '.join(cell(*each) for each in cells)} {ratio}{note}".rstrip()


def record(name: str, rows: list[Row], device: Device) -> dict[str, Any]:
    """What a claim must cite: device, versions, command and every row."""
    return {"benchmark": name, "command": command(), **device.facts(), "versions": versions(), "rows": rows}


def versions() -> dict[str, str]:
    return {"pmf": pmf.__version__, "torch": torch.__version__, "python": platform.python_version()}


def command() -> str:
    """The command of this run: `pmf bench ...` (or python -m pmf), or a script in benchmarks/."""
    program = Path(sys.argv[0])
    is_script = program.parent.name == "benchmarks" or program.name.startswith("bench_")
    return " ".join([f"python benchmarks/{program.name}" if is_script else "pmf", *sys.argv[1:]])


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record as JSON, creating its folder; if the process is killed, the old record remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def run_benchmark(
    name: str,
    cases: Callable[[Setting], Iterator[Planned]],
    setting: Setting,
    seconds: float,
    out: Path | None,
) -> int:
    """Run every case of a benchmark; the exit status is 1 if one of our results is wrong."""
    rows: list[Row] = []
    for planned in cases(setting):
        rows += run_case(planned, setting.device, seconds)
        setting.device.release()
    print_rows(rows)
    if out is not None:
        write_record(out / f"bench_{name}.json", record(name, rows, setting.device))
    return 0 if all(map(is_good, rows)) else 1
