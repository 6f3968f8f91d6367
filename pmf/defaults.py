"""Independence from PyTorch's global state: default dtype and device, inference mode and autocast.

Random draws depend only on the generator, and results only on the arguments. Models are the exception that
users expect: like PyTorch's own modules, they are created with the default dtype on the default device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["factory_defaults", "normal", "uniform", "whole_numbers"]


def uniform(*shape: int, generator: torch.Generator | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1), drawn on the generator's device and returned on the CPU."""
    return torch.rand(shape, generator=generator, dtype=dtype, device=home(generator)).cpu()


def normal(*shape: int, generator: torch.Generator | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, drawn on the generator's device and returned on the CPU."""
    return torch.randn(shape, generator=generator, dtype=dtype, device=home(generator)).cpu()


def whole_numbers(high: int, *shape: int, generator: torch.Generator | None) -> Tensor:
    """int64 integers from 0 to high - 1, drawn on the generator's device and returned on the CPU."""
    return torch.randint(high, shape, generator=generator, dtype=torch.int64, device=home(generator)).cpu()


def home(generator: torch.Generator | None) -> torch.device:
    """The device a generator draws on; None stands for the CPU's global generator."""
    if generator is None:
        return torch.device("cpu")
    if not hasattr(generator, "device"):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {generator!r}: for a seed give "
            "torch.Generator().manual_seed(SEED)"
        )
    return generator.device


@contextmanager
def factory_defaults() -> Iterator[None]:
    """Create tensors in float32 on the CPU whatever the global defaults. Also a decorator.

    For one-off construction, such as a network loaded from a file. The default dtype is global to the
    process, so code that may run beside other threads passes dtype and device explicitly instead.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def without_autocast(like: Tensor) -> Any:
    """A context with autocast disabled, so that products keep their arguments' dtype."""
    return torch.autocast(like.device.type, enabled=False) if like.device.type != "meta" else _Nothing()


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
