"""The emulator's own kernels, tests/emulator/*.cu, as compiled by g++ or by nvcc."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from helpers import emulator
from helpers.emulator import Planted
from helpers.ptx.backend import running
from helpers.ptx.modules import Module, of_source

CSRC = (emulator.ROOT / "csrc", emulator.ROOT / "csrc" / "include")
FILES = (emulator.SOURCE / "planted.cu", emulator.SOURCE / "probes.cu")


def of_nvcc(*files: Path, first: tuple[Path, ...] = ()) -> tuple[Module, ...]:
    """The PTX that nvcc generates, with headers in the folders `first` before csrc's."""
    return tuple(of_source(file, (*first, *CSRC)) for file in files)


@contextmanager
def planted_at(backend: str, modules: tuple[Module, ...] | None = None) -> Iterator[Planted]:
    """The kernels on backend "emulated" or "ptx", the latter optionally from other modules."""
    planted = Planted()
    with running(planted.path, modules or of_nvcc(*FILES)) if backend == "ptx" else nullcontext():
        yield planted
