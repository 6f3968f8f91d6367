"""Run each part in a separate process and keep its results, whatever happens to that process.

Sections are measured by a child that sends rows; the parent, which never touches the device, writes the
record after every case. A case that raises becomes a failed row. So does a case that ends the process or
leaves the device unusable; a new child then continues after it. A section that runs out of time is ended.
Commands are separate programs, ended with all their children when they run out of time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pmf import _library, checked
from pmf.bench.device import make_device
from pmf.bench.harness import DeviceLostError, Row, Scale, Setting, is_good, row_line, run_case, sentence
from pmf.devices import find_device
from pmf.errors import UserError

from .commands import Command, Run, rows_of
from .sections import PUBLISHED, Section
from .targets import Rates, add_shares, judge

LAST_CASE = 0.85
"""Fraction of a section's time after which it starts no new case."""
START_S = 30.0
"""Seconds for a process to reach its device, which takes long on a cold machine; not part of any section."""
NO_TIME = "no time left in this section"
NO_KERNELS = "this build of pmf has no CUDA kernels: install it with PMF_CUDA=on, which says what is missing"


class NoDeviceError(Exception):
    """There is no device to measure on; the message is for the user."""


class Runner:
    """Measures sections one after the other into `record["sections"]`.

    save: called whenever the record has changed. folder: for the output of commands.
    """

    def __init__(
        self,
        device: str,
        scale: Scale,
        record: dict[str, Any],
        save: Callable[[], None],
        folder: Path | None = None,
    ) -> None:
        self.device, self.scale, self.record, self.save = device, scale, record, save
        self.folder = Path(".") if folder is None else folder
        self.rates = Rates()
        self.todo: list[Section | Command] = []
        self.begun = 0
        """Cases of todo[0] that have finished, or were running when their process ended."""
        self.label: str | None = None
        """The running case."""

    def run(self, parts: Sequence[Section | Command]) -> None:
        """Raises NoDeviceError before measuring anything if there is no device."""
        self.record["sections"] = []
        self._look()
        self.todo = [part for part in parts if part.limits(self.scale).section > 0]
        while self.todo:
            part = self.todo[0]
            if isinstance(part, Command):
                self._run_command(part)
                continue
            with self._child(part, self._entry()["seconds"]) as messages:
                self._follow(messages)

    def _look(self) -> None:
        """Let a child describe the device before anything else touches it."""
        with self._child(None, 0.0) as messages:
            kind: str = "late"
            value: Any = None
            with contextlib.suppress(EOFError):  # each part will say so
                if messages.poll(START_S):
                    kind, value = messages.recv()
            if kind == "absent":
                raise NoDeviceError(value)
            if kind == "facts":
                self.record.update(value)

    def _run_command(self, command: Command) -> None:
        entry = self._entry()
        print(f"\n{command.name} (at most {entry['limit_s']:.0f} s)", flush=True)
        run = Run(self.device, self.scale, self.folder.resolve())
        words = command.words(run)
        if isinstance(words, str):
            rows = [{"case": command.name, "contestant": "pmf", "ours": True, "skipped": words}]
        else:
            log = self.folder / "logs" / f"{command.name.replace(', ', '_').replace(' ', '_')}.txt"
            start = time.monotonic()
            status = _call(words, log, entry["limit_s"])
            entry["seconds"] = time.monotonic() - start
            rows = rows_of(command, run, status, log)
        self._take(rows)
        self._next_section()

    @contextmanager
    def _child(self, section: Section | None, spent: float) -> Iterator[Connection]:
        """Without a section it only describes the device."""
        context = multiprocessing.get_context("fork")  # the child inherits the parent's imports
        receiver, sender = context.Pipe(duplex=False)
        given = (sender, self.device, self.scale, section, self.begun, spent)
        child = context.Process(target=_work, args=given)
        child.start()
        sender.close()  # so that the end of the child ends its messages
        try:
            yield receiver
        finally:
            child.kill()
            child.join()

    def _follow(self, messages: Connection) -> None:
        """Process one child's messages until its section is done or another child is needed."""
        self.label, has_device = None, False
        last = time.monotonic()
        while True:
            entry = self._entry()
            left = entry["limit_s"] - entry["seconds"] if has_device else START_S
            kind: str
            value: Any
            try:
                in_time = messages.poll(max(0.0, left))
                kind, value = messages.recv() if in_time else ("late", None)
            except EOFError:
                kind, value = "died", None
            now = time.monotonic()
            if has_device:
                entry["seconds"] += now - last
            last = now
            match kind:
                case "absent":
                    raise NoDeviceError(value)
                case "facts":
                    has_device = True
                    self.record.update(value)
                case "case":
                    self.label = value
                    if self.begun == 0:
                        print(f"\n{entry['name']} (at most {entry['limit_s']:.0f} s)", flush=True)
                    self.begun += 1
                case "rows":
                    self.label = None
                    self._take(value)
                case "end":
                    if value:  # while they still belong to this work
                        entry["clocks"] = value
                    self._next_section()
                    return
                case "lost":
                    self._take(value)
                    return
                case "late":
                    limit = f"{entry['limit_s']:.0f} s, the section's limit"
                    self._fail(f"ended after {limit}" if has_device else f"no device after {START_S:.0f} s")
                    self._next_section()
                    return
                case "died":
                    self._fail("the process ended without a message")
                    if self.label is None:  # not caused by a case: it would happen again
                        self._next_section()
                    return
            self.save()

    def _entry(self) -> dict[str, Any]:
        """The current section's part of the record."""
        entries, section = self.record["sections"], self.todo[0]
        if not entries or entries[-1]["name"] != section.name:
            limit = section.limits(self.scale).section
            entries.append({"name": section.name, "limit_s": limit, "seconds": 0.0, "rows": []})
        return entries[-1]

    def _next_section(self) -> None:
        self.todo, self.begun = self.todo[1:], 0
        self.save()

    def _fail(self, why: str) -> None:
        ours = self.todo[0].name != PUBLISHED
        row = {"case": self.label or "between cases", "contestant": "pmf", "ours": ours, "failed": why}
        self._take([row])
        self.save()

    def _take(self, rows: list[Row]) -> None:
        for row in rows:
            self.rates.learn(row)
        self.record["rates"] = self.rates.as_dict()
        for row in rows:
            add_shares(row, self.rates)
        if found := judge(rows):
            rows[0]["targets"] = found
        self._entry()["rows"] += rows
        for row in rows:
            print(row_line(row), flush=True)


def failures(record: dict[str, Any]) -> list[Row]:
    """Rows that show a fault of ours, or that could not be run."""
    return [row for entry in record["sections"] for row in entry["rows"] if not is_good(row)]


def _why_not(name: str) -> str | None:
    """Why nothing can be measured on this device."""
    try:
        kind = find_device(name).type
    except UserError as problem:
        return str(problem)
    module = _library.introspection()
    return NO_KERNELS if kind == "cuda" and module and not module.build_facts()["has_cuda"] else None


def _call(words: list[str], log: Path, seconds: float) -> int | None:
    """The exit status of a program, whose output goes to a log; None if it ran out of time."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as told:
        # With -m Python searches the current folder first: the sources would hide an installed package.
        process = subprocess.Popen(
            words, stdout=told, stderr=subprocess.STDOUT, start_new_session=True, cwd=log.parent
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # whatever it started and left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _work(
    sender: Connection, name: str, scale: Scale, section: Section | None, skip: int, spent: float
) -> None:
    """The child. It sends (kind, value): "case" before a case and "rows" after it, "end" after the section.

    skip, spent: cases and seconds of the section that earlier children have used.
    """
    if problem := _why_not(name):
        sender.send(("absent", problem))
        return
    device = make_device(find_device(name))
    checked.forgo_reminder()
    sender.send(("facts", device.facts()))
    if section is None:
        return
    setting = Setting(device, scale)
    limits = section.limits(scale)
    end = time.monotonic() + LAST_CASE * limits.section - spent
    for number, planned in enumerate(section.cases(setting)):
        if number < skip:
            continue
        sender.send(("case", planned.label))
        base = {**planned.facts, "case": planned.label, "contestant": "pmf"}
        if time.monotonic() > end:
            sender.send(("rows", [{**base, "skipped": NO_TIME}]))
            continue
        try:
            rows = run_case(planned, device, limits.case)
        except DeviceLostError as lost:
            sender.send(("lost", [{**base, "ours": True, "failed": sentence(lost)}]))
            os._exit(1)  # cleaning up would access the device
        sender.send(("rows", rows))
        del planned
        device.release()
    sender.send(("end", device.clocks()))
