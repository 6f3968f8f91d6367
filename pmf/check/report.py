"""Run a check: one process for the CPU and one per GPU, a line per family, and a verdict.

A process that crashes or hangs spoils one case, and another continues after it. A GPU that passes is recorded
(`pmf.checked`); one that fails or was not fully checked loses its record.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from pmf import _library, checked, env, kernels
from pmf.atomic import write_file
from pmf.errors import UserError

from .table import checks
from .tolerance import dtype_name
from .work import Row

__all__ = ["find_places", "run"]

START_S = 120.0
"""Seconds for a process to reach its device, which takes long on a cold machine."""
CASE_S = 60.0
ENDS = 4
"""After this many early ends of a device's processes, its remaining cases are not checked."""


def find_places(device: str | None) -> list[str]:
    """The CPU and every GPU, or the one that is named. Raises UserError if it does not exist."""
    count = torch.cuda.device_count()
    gpus = [f"cuda:{i}" for i in range(count)]
    if device is None:
        return ["cpu", *gpus]
    if device == "cpu":
        return ["cpu"]
    wanted = gpus if device == "cuda" else [device]
    if not wanted or not set(wanted) <= set(gpus):
        there = f"cpu, {', '.join(gpus)}" if gpus else "only cpu (torch finds no CUDA device)"
        raise UserError(f"--device {device} does not exist; available: {there}")
    return wanted


def run(
    places: Sequence[str], families: tuple[str, ...] = (), size: str = "", out: Path | None = None
) -> int:
    """Check, print, write the record; returns 1 if anything is wrong. size: of the cases, or per device."""
    start = time.monotonic()
    print(f"Every op against float64: the largest error of each family, 1.00 being its limit ({_kernels()})")
    runs = [_Place(place, size or ("small" if place == "cpu" else "full"), families) for place in places]
    for one in runs[:1] if places[0] == "cpu" else ():  # its threads need the processor to themselves
        one.follow()
    _at_once([one for one in runs if not one.ended])
    off = list(itertools.chain.from_iterable(one.off() for one in runs))
    _mark(runs, families)
    if out is not None:
        record = {
            "command": "pmf check",
            "date": time.strftime("%Y-%m-%d"),
            "seconds": time.monotonic() - start,
            "kernels": _kernels(),
            "environment": env.facts(),
            "off": off,
            "places": [one.record() for one in runs],
        }
        write_file(out, (json.dumps(record, indent=1) + "\n").encode())
    right = [column for one in runs if not one.off() for column in one.columns]
    if right:
        print(f"correct on {', '.join(right)} ({time.monotonic() - start:.0f} s)")
    for problem in off:
        print(f"off: {problem}", file=sys.stderr)
    return 1 if off else 0


class _Place:
    """The results from the processes of one device."""

    def __init__(self, name: str, size: str, families: tuple[str, ...]) -> None:
        self.name, self.size, self.families = name, size, families
        self.checks = checks(size, families)
        self.columns: list[str] = []
        self.rows: list[Row] = []
        self.unchecked: str | None = None
        """Why the rest of this device, or all of it, was not checked."""
        self.ended = False
        self.seconds = 0.0
        self._begun = 0
        self._printed = 0

    def follow(self) -> None:
        """Start processes until every case has its rows."""
        start = time.monotonic()
        for _ in range(ENDS):
            with self._process() as messages:
                self._take(messages)
            if self.ended:
                break
        else:
            self.unchecked = f"{ENDS} processes ended early, so the rest was skipped"
        self.ended = True
        self._print_families(len(self.checks))
        self.seconds = time.monotonic() - start

    @contextmanager
    def _process(self) -> Iterator[tuple[Connection, subprocess.Popen[bytes]]]:
        """A new interpreter: a fork would share the state of CUDA and OpenMP."""
        receiver, sender = multiprocessing.Pipe(duplex=False)
        given = self.name, self.size, self.families, self._begun
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from pmf.check.work import main; main(%d, *{given!r})"
        )
        with sender:  # so that the end of the process ends its messages
            command = [sys.executable, "-c", code % sender.fileno()]
            process = subprocess.Popen(command, pass_fds=[sender.fileno()])
        try:
            yield receiver, process
        finally:
            process.kill()
            process.wait()
            receiver.close()

    def _take(self, source: tuple[Connection, subprocess.Popen[bytes]]) -> None:
        messages, process = source
        label: str | None = None
        limit = START_S
        while True:
            kind: str
            value: Any
            try:
                kind, value = messages.recv() if messages.poll(limit) else ("late", None)
            except EOFError:
                kind, value = "died", None
            match kind:
                case "absent":
                    self.unchecked, self.ended = value, True
                    return
                case "here":
                    self.columns, limit = value, CASE_S
                case "begin":
                    label, self._begun = value, self._begun + 1
                    self._print_families(self._begun - 1)
                case "row":
                    self.rows.append(value)
                case "end":
                    self.ended = True
                    return
                case "late" | "died":
                    why = f"no answer within {limit:.0f} s" if kind == "late" else _ending(process.wait())
                    if label is None:  # not caused by a case: it would happen again
                        self.unchecked, self.ended = f"its process did not start: {why}", True
                    elif not (self.rows and self.rows[-1].get("lost")):
                        self._spoil(why)
                    self.ended = self.ended or self._begun == len(self.checks)
                    return

    def _spoil(self, why: str) -> None:
        check = self.checks[self._begun - 1]
        had = {row["place"] for row in self.rows if row["case"] == check.label}
        column = next((c for c in self.columns if c not in had), self.columns[-1])
        row = {"family": check.family, "case": check.label, "shape": list(check.shape)}
        self.rows.append({**row, "dtype": dtype_name(check.dtype), "place": column, "failed": why})

    def off(self) -> list[str]:
        """A sentence for each wrong family, and for each that was not checked."""
        found = []
        where = "" if self.name == "cpu" else f"{self.name}, "
        for family in dict.fromkeys(check.family for check in self.checks):
            bad = [row for row in self.rows if row["family"] == family and _worst(row) > 1]
            if not bad:
                continue
            worst = max(bad, key=_worst)
            places = ", ".join(dict.fromkeys(row["place"] for row in bad))
            found.append(f"{family} is wrong on {where}{places}: {_what(worst)}; {_advice(family)}")
        left = sorted({row["family"] for row in self.rows if "not_checked" in row})
        if left:
            found.append(
                f"{', '.join(left)} on {where}{self.columns[0]} could not be checked to the end, as memory "
                "ran out: run pmf check again when more of it is free"
            )
        if self.unchecked is not None:
            found.append(f"{self.name} was not checked to the end: {self.unchecked}")
        return found

    def record(self) -> dict[str, Any]:
        return {
            "place": self.name,
            "columns": self.columns,
            "size": self.size,
            "seconds": self.seconds,
            "right": not self.off(),
            "unchecked": self.unchecked,
            "rows": [_as_json(row) for row in self.rows],
        }

    def _print_families(self, cases: int) -> None:
        """Print the families completed by the first `cases` cases."""
        while self._printed < cases:
            family = self.checks[self._printed].family
            end = self._printed + sum(check.family == family for check in self.checks)
            if end > cases:
                return
            if self._printed == 0:
                head = "".join(f"{column:>{max(12, len(column) + 2)}}" for column in self.columns)
                with _printing:
                    print(f"{self.name:18}{head}", flush=True)
            line = "".join(f"{self._cell(family, c):>{max(12, len(c) + 2)}}" for c in self.columns)
            with _printing:
                print(f"  {family:16}{line}", flush=True)
            self._printed = end

    def _cell(self, family: str, column: str) -> str:
        rows = [row for row in self.rows if (row["family"], row["place"]) == (family, column)]
        worst = max(map(_worst, rows), default=0.0)
        if any("failed" in row for row in rows):
            return "FAILED"
        if worst > 1:
            return f"WRONG {worst:.2f}"
        return f"{worst:.2f}" if rows and all("errors" in row for row in rows) else "not checked"


_printing = threading.Lock()


def _at_once(places: list[_Place]) -> None:
    """GPUs are checked concurrently."""
    threads = [threading.Thread(target=place.follow) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _mark(places: list[_Place], families: tuple[str, ...]) -> None:
    """Only a check of every kernel can record a pass; any wrong result removes the record."""
    by_name: dict[str, list[_Place]] = {}
    for place in places:
        if place.name != "cpu" and place.columns:
            by_name.setdefault(place.columns[0], []).append(place)
    for name, same in by_name.items():
        passed = not any(place.off() for place in same)
        complete = not families and not kernels.references()
        if (complete or not passed) and not checked.mark(name, passed):
            print(f"note: the cache folder cannot be written, so {name} is not recorded", file=sys.stderr)


def _kernels() -> str:
    names = kernels.references()
    if not names:
        return f"kernels of {_library.LIBRARY.name}"
    which = "all" if set(names) == set(kernels.NAMES) else ", ".join(sorted(names))
    return f"PMF_KERNELS: references for {which}"


def _as_json(row: Row) -> Row:
    """JSON has no infinity: null is the error of a result with inf or NaN."""
    if "errors" not in row:
        return row
    return {**row, "errors": {k: x if math.isfinite(x) else None for k, x in row["errors"].items()}}


def _worst(row: Row) -> float:
    if "failed" in row:
        return float("inf")
    return max(row.get("errors", {}).values(), default=0.0)


def _what(row: Row) -> str:
    if "failed" in row:
        return f"{row['case']} failed ({row['failed']})"
    direction = max(row["errors"], key=row["errors"].__getitem__)
    return f"the {direction} of {row['case']} is {row['errors'][direction]:.3g} times its limit from float64"


def _advice(family: str) -> str:
    name = "attention" if family == "attention_varlen" else family
    if name in kernels.references():
        return "please report it with the output of pmf env"
    return (
        f"PMF_KERNELS=reference:{name} runs without its kernels; please report it with the output of pmf env"
    )


def _ending(code: int) -> str:
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with status {code}"
