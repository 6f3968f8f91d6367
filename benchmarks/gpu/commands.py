"""The parts of a run that are separate programs: checks, tests, probes, profilers, sanitizers.

Their output goes to DIR/logs as it is produced, so that nothing is lost.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pmf.bench.harness import Row, Scale

ROOT = Path(__file__).resolve().parents[2]
SMALL, SHORT, LONG = "2x2x70x64", "256x12x276x64", "64x12x1024x64"
PROFILED = "(attention|hopper)_forward_kernel"
"""The kernels whose profile ncu takes: which of them runs depends on the GPU."""


class Run(NamedTuple):
    """The run as a command sees it: `device` is cuda or cpu, `folder` the place for results."""

    device: str
    scale: Scale
    folder: Path


class Limit(NamedTuple):
    section: float


class Command(NamedTuple):
    """words: the command line; or, as a string, why there is none here.

    rows: the results when it has finished (given its exit status; None after a time-out). Without it, a
    non-zero status is a failure, but a time-out is not.
    leaves: the file without which the part counts as skipped: profilers need permissions that few users have.
    """

    name: str
    words: Callable[[Run], list[str] | str]
    full: Limit
    quick: Limit
    rows: Callable[[Run, int | None], list[Row]] | None = None
    leaves: Callable[[Run], Path] | None = None

    def limits(self, scale: Scale) -> Limit:
        return self.quick if scale == "quick" else self.full


def python(*words: str | Path) -> list[str]:
    return [sys.executable, *map(str, words)]


# ---- pmf check


def check_record(run: Run) -> Path:
    return run.folder / "check.json"


def check_words(run: Run) -> list[str]:
    size = [] if run.scale == "full" else ["--quick"]
    return python("-m", "pmf", "check", "--device", run.device, "--out", check_record(run), *size)


def check_rows(run: Run, status: int | None) -> list[Row]:
    """A row per case, with the error in units of the limit."""
    try:
        record = json.loads(check_record(run).read_text())
    except (OSError, ValueError):
        record = {"places": [], "off": ["pmf check left no record"]}
    rows: list[Row] = []
    for place in record["places"]:
        for found in place["rows"]:
            row = {
                "case": f"{found['case']} on {found['place']}",
                "op": f"check {found['family']}",
                "dtype": found["dtype"],
                "contestant": "pmf",
                "ours": True,
            }
            if "failed" in found:
                rows.append({**row, "failed": found["failed"]})
            elif "not_checked" in found:
                rows.append({**row, "skipped": found["not_checked"]})
            elif None in found["errors"].values():
                rows.append({**row, "failed": "results with inf or NaN"})
            else:
                error = max(found["errors"].values())
                rows.append({**row, "error": error, "limit": 1.0, "right": error <= 1})
    if status is None or (status != 0 and all(row.get("right") for row in rows)):
        why = "; ".join(record["off"]) or "it ran out of time"
        rows.append({"case": "pmf check", "op": "check", "contestant": "pmf", "ours": True, "failed": why})
    return rows


# ---- the ops' tests


def tests_words(run: Run) -> list[str] | str:
    """The tests that run on the device; on a CPU, one file at one level, as a smoke test."""
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed: pip install 'pixelmeanflow[test]'"
    if run.device == "cpu":
        return python("-m", "pytest", ROOT / "tests/ops/test_elementwise_sizes.py", "-k", "portable")
    spread = ["-n", "4"] if importlib.util.find_spec("xdist") is not None else []
    return python("-m", "pytest", *spread, ROOT / "tests/ops", ROOT / "tests/optim", "-k", "cuda")


# ---- probes, profilers and sanitizers


def rates_words(run: Run) -> list[str] | str:
    if run.device == "cpu":
        return "instruction rates are measured on a GPU"
    if shutil.which("nvcc") is None:
        return "nvcc, which builds the probe, is not on PATH"
    return python(ROOT / "benchmarks/machine_rates.py", "--out", run.folder / "machine_rates.json")


def tune_words(run: Run) -> list[str] | str:
    if run.device == "cpu":
        return "plans compete on a GPU"
    return python(ROOT / "benchmarks/tune.py", "--out", run.folder / "plans.json")


def profile(shape: str) -> Callable[[Run], Path]:
    return lambda run: run.folder / f"ncu_jvp_{shape}.ncu-rep"


def profile_words(shape: str) -> Callable[[Run], list[str] | str]:
    """ncu on attention with tangents."""

    def words(run: Run) -> list[str] | str:
        if run.device == "cpu":
            return "ncu needs a GPU"
        if (ncu := shutil.which("ncu")) is None:
            return "ncu is not on PATH"
        report = profile(shape)(run)
        report.unlink(missing_ok=True)
        name = str(report.with_suffix(""))
        chosen = ["--set", "full", "--kernel-name", f"regex:{PROFILED}", "--launch-skip", "1"]
        return [ncu, *chosen, "--launch-count", "1", "--force-overwrite", "-o", name, *_one(shape)]

    return words


def race_words(run: Run) -> list[str] | str:
    if run.device == "cpu":
        return "compute-sanitizer needs a GPU"
    if (sanitizer := shutil.which("compute-sanitizer")) is None:
        return "compute-sanitizer is not on PATH"
    return [sanitizer, "--tool", "racecheck", "--error-exitcode", "9", *_one(SMALL, "--backward")]


def _one(shape: str, *more: str) -> list[str]:
    return python(ROOT / "benchmarks/gpu/one_call.py", shape, *more)


def rows_of(command: Command, run: Run, status: int | None, log: Path) -> list[Row]:
    """A command's rows. If it reports none: its status and last line."""
    if command.rows is not None:
        return command.rows(run, status)
    row: dict[str, Any] = {"case": command.name, "contestant": "pmf", "ours": True, "log": log.name}
    if status is None:
        return [{**row, "skipped": f"it ran out of time; {last_line(log)}"}]
    if command.leaves is not None and not command.leaves(run).exists():
        return [{**row, "skipped": f"it left no {command.leaves(run).name}: {last_line(log)}"}]
    if status != 0:
        return [{**row, "failed": f"status {status}: {last_line(log)}"}]
    return [{**row, "right": True, "said": last_line(log)}]


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"


CHECKS = Command("checks", check_words, Limit(150), Limit(25), check_rows)
TESTS = Command("op tests", tests_words, Limit(180), Limit(0))
RATES = Command("machine rates", rates_words, Limit(60), Limit(0))
PROFILES = tuple(
    Command(f"ncu, JVP {shape}", profile_words(shape), Limit(75), Limit(0), leaves=profile(shape))
    for shape in (SHORT, LONG)
)
TUNE = Command("plans", tune_words, Limit(240), Limit(0))
RACES = Command("racecheck", race_words, Limit(120), Limit(0))
