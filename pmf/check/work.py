"""The process for one device: computes cases and sends the results; the parent (`report`) survives it.

A device is the CPU, at each level that the processor has, or one GPU. Messages are (kind, value): "here" with
the names of its columns, "begin" before a case, "row" after it for each column, "end" at the end; "absent"
with a sentence if nothing can be checked, "lost" if the device no longer responds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from pmf import _library, checked, plans
from pmf.devices import is_out_of_memory

from .table import Check, checks
from .tolerance import dtype_name

__all__ = ["LEAST_MEMORY", "LEVELS", "Row", "main", "sentence"]

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
LEAST_MEMORY = 4 << 30
"""Bytes that a GPU's cases need, with margin: exact results of the largest, PyTorch's cache, CUDA."""
OLDEST = (8, 0)
Row = dict[str, Any]


def main(handle: int, place: str, size: str, families: tuple[str, ...], skip: int) -> None:
    """handle: of the pipe that this process inherits from its parent."""
    with Connection(handle, readable=False) as sender:
        work(sender, place, size, families, skip)


def work(sender: Connection, place: str, size: str, families: tuple[str, ...], skip: int) -> None:
    """skip: number of cases already handled by other processes."""
    try:
        columns = _cpu() if place == "cpu" else _gpu(place)
    except _NothingToCheckError as problem:
        sender.send(("absent", str(problem)))
        return
    device = torch.device(place)
    sender.send(("here", list(columns)))
    for number, check in enumerate(checks(size, families)):
        if number < skip:
            continue
        sender.send(("begin", check.label))
        for row in _rows(check, device, columns):
            sender.send(("row", row))
            if "lost" in row:
                os._exit(1)  # cleaning up would access the device
    sender.send(("end", None))


class _NothingToCheckError(Exception):
    pass


def _cpu() -> dict[str, Callable[[], Any]]:
    """A setup function per level. One thread: for work this small several would wait for each other."""
    threads, best = torch.get_num_threads(), None
    columns: dict[str, Callable[[], Any]] = {}
    for level in LEVELS:
        try:
            _library.set_cpu_level(level)
        except ValueError:
            continue
        columns[level], best = _at_level(level, 1), level
    if threads > 1 and best is not None:
        columns[f"{threads} threads"] = _at_level(best, threads)
    return columns


def _at_level(level: str, threads: int) -> Callable[[], None]:
    def set_up() -> None:
        _library.set_cpu_level(level)
        torch.set_num_threads(threads)

    return set_up


def _gpu(place: str) -> dict[str, Callable[[], Any]]:
    module = _library.introspection()
    try:
        torch.cuda.set_device(place)
        name = torch.cuda.get_device_name(place)
        free, total = torch.cuda.mem_get_info(place)
        capability = torch.cuda.get_device_capability(place)
    except (RuntimeError, AssertionError) as problem:
        raise _NothingToCheckError(f"it cannot be used now ({sentence(problem)})") from problem
    if module is not None and not module.build_facts()["has_cuda"]:
        raise _NothingToCheckError(
            f"{name} has no kernels in this build of pmf: reinstall it with PMF_CUDA=on, which reports "
            "what is missing"
        )
    if capability < OLDEST:
        raise _NothingToCheckError(f"{name} is older than sm_80, which pmf's kernels need")
    if free < LEAST_MEMORY:
        raise _NothingToCheckError(
            f"{name} has only {free / 2**30:.1f} of {total / 2**30:.0f} GiB free, but a check needs "
            f"{LEAST_MEMORY / 2**30:.0f} GiB: run it again when other processes have freed theirs"
        )
    checked.forgo_reminder()
    plans.load(torch.cuda.current_device(), name)
    return {name: torch.cuda.synchronize}


def _rows(check: Check, device: torch.device, columns: dict[str, Callable[[], Any]]) -> list[Row]:
    base = {
        "family": check.family,
        "case": check.label,
        "shape": list(check.shape),
        "dtype": dtype_name(check.dtype),
    }
    rows: list[Row] = []
    measure: Any = None
    for column, set_up in columns.items():
        if column.endswith("threads") and check.dtype != torch.float32:
            continue  # the division of work does not depend on the dtype
        row: Row = {**base, "place": column}
        try:
            set_up()
            measure = check.prepare(device) if measure is None else measure
            row["errors"] = measure()
        except Exception as problem:  # an op may raise anything, and the others must still be checked
            if is_out_of_memory(problem):
                row["not_checked"] = "memory ran out"
                torch.cuda.empty_cache()
            else:
                row["failed"] = sentence(problem)
            if device.type == "cuda" and not _is_alive():
                row["lost"] = True
        rows.append(row)
    return rows


def _is_alive() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def sentence(problem: BaseException) -> str:
    """The first line of an exception's message, with its type."""
    text = str(problem).strip()
    return f"{type(problem).__name__}: {text.splitlines()[0]}" if text else type(problem).__name__
