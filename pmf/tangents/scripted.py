"""Reject TorchScript, in which tangents are correct only by chance.

From the second call on its executor differentiates and fuses parts of a graph itself, on detached values and
with kernels that no dispatch mode sees; torch.func.jvp can be wrong, too. No mode sees the call itself, so
the classes' `__call__` is replaced while a pass runs. They are global to the process: uses are counted under
a lock, and calls in other threads pass.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["without_torchscript"]

_KINDS: tuple[Any, ...] = (torch._C.ScriptFunction, torch._C.ScriptMethod)
_calls = {kind: kind.__call__ for kind in _KINDS}
_lock = threading.Lock()
_inside = 0
_here = threading.local()


@contextlib.contextmanager
def without_torchscript() -> Iterator[None]:
    """Inside it, calls of ScriptFunctions and ScriptModules by this thread raise."""
    before = getattr(_here, "refuses", False)
    _count(1)
    _here.refuses = True
    try:
        yield
    finally:
        _here.refuses = before
        _count(-1)


def _count(step: int) -> None:
    global _inside
    with _lock:
        _inside += step
        for kind in _KINDS:
            kind.__call__ = _call if _inside else _calls[kind]


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    if getattr(_here, "refuses", False):
        raise RuntimeError(
            f"Jvp: the network runs TorchScript ({self.name}), which loses tangents: use the original "
            "function or module, or set PYTORCH_JIT=0, which turns torch.jit.script off"
        )
    return _calls[type(self)](self, *args, **kwargs)
