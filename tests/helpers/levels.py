"""The levels of the CPU kernels, switched inside one process."""

from collections.abc import Iterator
from contextlib import contextmanager

from pmf import _library


@contextmanager
def at_level(name: str) -> Iterator[None]:
    """Run the kernels at a level, then at the default again; ValueError if the processor lacks it."""
    _library.set_cpu_level(name)
    try:
        assert _library.cpu_level() == name
        yield
    finally:
        _library.set_cpu_level("auto")


def _exists(name: str) -> bool:
    try:
        with at_level(name):
            return True
    except ValueError:
        return False


LEVELS = tuple(name for name in ("portable", "avx2", "avx512", "avx512_bf16") if _exists(name))
