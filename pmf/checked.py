"""Which GPUs have passed `pmf check`: records in the cache folder, and a warning without one.

A record holds for one GPU model with one driver, PyTorch version and library build. Without a readable folder
there are no records.
"""

import json
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from pmf import _library, plans
from pmf.atomic import write_file
from pmf.plans import cache_folder

NVIDIA_DRIVER = Path("/sys/module/nvidia/version")


def remind(x: Tensor) -> None:
    """Before a process's first kernel on a GPU: load its tuned plans, and warn unless it has been checked.

    torch.compile calls it too, with fake tensors, when it runs an op that its graphs will contain; only where
    it would trace into this function does nothing happen.
    """
    if not x.is_cuda or torch.compiler.is_dynamo_compiling() or x.device.index in _reminded:
        return
    _reminded.add(x.device.index)
    if not torch.cuda.is_available():  # fake tensors need no GPU
        return
    name = torch.cuda.get_device_name(x.device)
    plans.load(x.device.index, name)
    if passed_on(name) is None:
        warnings.warn(
            f"pmf's kernels have not been checked on this {name} yet: run `pmf check`, which takes about a "
            "minute (PMF_KERNELS=reference runs without them)",
            RuntimeWarning,
            stacklevel=2,
        )


def forgo_reminder() -> None:
    """Suppress the reminder in the checking process."""
    _reminded.update([None, *range(torch.cuda.device_count())])


def passed_on(gpu: str) -> str | None:
    """The date on which this GPU model passed a check; None if it has not."""
    found = _marks().get(_key(gpu))
    return found if isinstance(found, str) else None


def mark(gpu: str, passed: bool) -> bool:
    """Record the result of a check for a GPU model; False if the record cannot be written."""
    path, marks = _file(), _marks()
    marks.pop(_key(gpu), None)
    if passed:
        marks[_key(gpu)] = time.strftime("%Y-%m-%d")
    try:
        if path is None:
            return False
        write_file(path, (json.dumps(marks, indent=1, sort_keys=True) + "\n").encode())
    except OSError:
        return False
    return True


_reminded: set[int | None] = set()


def _key(gpu: str) -> str:
    try:
        driver = NVIDIA_DRIVER.read_text().strip()
    except OSError:
        driver = "unknown driver"
    return f"{gpu} | driver {driver} | torch {torch.__version__} | {_library.identity()}"


def _file() -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / "checked.json"


def _marks() -> dict[str, str]:
    path = _file()
    try:
        found = json.loads(path.read_text()) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
