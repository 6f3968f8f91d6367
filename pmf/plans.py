"""Tables of tuned plans: how attention's kernels are cut into blocks on one GPU model, as measured there.

`benchmarks/tune.py` writes them to the cache folder; the first kernel of a process on a GPU loads its table.
Without a table, or with one for another card or library, the library's own model chooses.
"""

import json
import operator
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pmf import _library
from pmf.atomic import write_file

LAUNCHES = ("forward", "backward_queries", "backward_keys")
DTYPES = ("float32", "bfloat16", "float16")
"""In the order of csrc/include/pmf/common.h."""


class Plan(NamedTuple):
    """A tuned attention launch and its plan; csrc/cuda/attention/attention_choices.h defines the fields."""

    launch: str
    dtype: str
    allow_tf32: bool
    tangent: bool
    queries: int
    keys: int
    width: int
    value_width: int
    kernel: int
    warps: int
    slots: int

    def numbers(self) -> list[int]:
        """The row that the library reads; raises ValueError or TypeError for values that cannot be in one."""
        row = [LAUNCHES.index(self.launch), DTYPES.index(self.dtype), *map(operator.index, self[2:])]
        if not all(0 <= number < 2**31 for number in row):
            raise ValueError(f"{self} has numbers that are negative or too large")
        return row


def cache_folder() -> Path | None:
    """The folder for records about this machine; None for a user without a home folder."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return folder / "pixelmeanflow"


def table_file(gpu: str) -> Path | None:
    """The table of a GPU model."""
    folder = cache_folder()
    return (
        None if folder is None else folder / "plans" / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-')}.json"
    )


def use(device: int, plans: Sequence[Plan]) -> None:
    """Make a device's launchers use exactly these plans; device -1 is for dry runs."""
    torch.ops.pmf.set_attention_plans(device, [number for plan in plans for number in plan.numbers()])


def load(device: int, gpu: str) -> None:
    """Use the table of a GPU model on a device; a warning says why one cannot be used."""
    plans, problem = read(gpu)
    if problem is not None:
        warnings.warn(problem, RuntimeWarning, stacklevel=2)
    if plans:
        use(device, plans)


def read(gpu: str) -> tuple[list[Plan], str | None]:
    """The plans for a GPU model, and what is wrong with its table, in one sentence."""
    path = table_file(gpu)
    try:
        if path is None or not path.exists():
            return [], None
        record = json.loads(path.read_text())
        device, library, plans = record["device"], record["library"], [Plan(**row) for row in record["plans"]]
        for plan in plans:
            plan.numbers()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [], f"{path} is not a table of plans, so {_AGAIN}"
    if device != gpu:
        return [], f"{path} holds plans for {device}, not for this {gpu}, so {_AGAIN}"
    if library != _library.identity():
        return (
            [],
            f"{path} holds plans of {library}, not of this library ({_library.identity()}), so {_AGAIN}",
        )
    return plans, None


_AGAIN = "pmf's model chooses instead: run benchmarks/tune.py again, or delete the file"


def record(gpu: str, plans: Sequence[Plan], **facts: Any) -> dict[str, Any]:
    """A table as it is written."""
    rows = [plan._asdict() for plan in plans]
    return {"device": gpu, "library": _library.identity(), "plans": rows, **facts}


def write(path: Path, table: dict[str, Any]) -> None:
    """Write a table; raises OSError."""
    write_file(path, (json.dumps(table, indent=1) + "\n").encode())
