"""Where the kernels run: the CPU levels, the emulator, and a GPU, switched within one process.

Each is a namespace of raw ops that replaces torch.ops.pmf. The emulator's runs the CUDA kernels on CPU
tensors, compiled for the CPU (tests/emulator) or by nvcc (helpers/ptx); the GPU's copies tensors there and
the results back, so one test covers all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from helpers import emulator
from helpers.machine_code import tool
from helpers.ptx import backend as ptx
from torch import Tensor

from pmf import _library
from pmf.check import work


@contextmanager
def at_level(name: str) -> Iterator[None]:
    """Run the kernels at this level inside the block; ValueError if the processor lacks it."""
    if name in ("emulated", "ptx", "cuda"):
        namespace = _OnGpu(torch.ops.pmf) if name == "cuda" else emulator.namespace()
        with (
            ptx.running(emulator.LIBRARY, ptx.of_this_build()) if name == "ptx" else nullcontext(),
            mock.patch.object(torch.ops, "pmf", namespace),
            mock.patch.object(_library, "takes_cuda_kernel", lambda tensor: True),
        ):
            yield
        return
    _library.set_cpu_level(name)
    try:
        assert _library.cpu_level() == name
        yield
    finally:
        _library.set_cpu_level("auto")


def float32_on_a_gpu_last(items: list[Any]) -> None:
    """Order tests for a run that may be cut short: tensor cores strain the limits of float32 most."""

    def is_last(item: Any) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return params.get("level") == "cuda" and params.get("dtype") == torch.float32

    items.sort(key=is_last)


class _OnGpu:
    """torch.ops.pmf for tensors on the CPU, computed on the GPU."""

    def __init__(self, namespace: Any) -> None:
        self._namespace = namespace

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(self._namespace, name)
        return lambda *args: _map(lambda x: x.cpu(), op(*_map(_ToGpu(), args)))


class _ToGpu:
    """Copies whole storages, to keep strides and the memory between elements; a huge one is copied
    element by element only.
    """

    HUGE = 2**30

    def __init__(self) -> None:
        self._copies: dict[tuple[int, torch.dtype], Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        huge, key = storage.nbytes() >= self.HUGE, (storage.data_ptr(), x.dtype)
        if key not in self._copies or storage.nbytes() == 0:
            whole = torch.empty(0, dtype=x.dtype).set_(storage)
            self._copies[key] = torch.empty_like(whole, device="cuda") if huge else whole.cuda()
        view = self._copies[key].as_strided(x.shape, x.stride(), x.storage_offset())
        return view.copy_(x) if huge else view


def _map(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, (tuple, list)):
        return type(values)(_map(function, x) for x in values)
    return values


def _exists(name: str) -> bool:
    try:
        with at_level(name):
            return True
    except ValueError:
        return False


CPU_LEVELS = tuple(name for name in work.LEVELS if _exists(name))
EMULATED = ("emulated",) if emulator.why_not() is None else ()
LEVELS = (*CPU_LEVELS, *EMULATED, *(("cuda",) if torch.cuda.is_available() else ()))
NVCC = ("ptx",) if ptx.why_not() is None and tool("nvcc") is not None else ()
PTX = ("ptx",) if ptx.why_not() is None else ()
EVERYWHERE = (*LEVELS, *PTX)
"""For parametrised tests. Tests that pick levels at random use LEVELS, as `ptx` compiles what it runs."""
