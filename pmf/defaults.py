"""Independence of PyTorch's global state: its default dtype and device, inference mode and autocast.

What a function of this package draws depends on the generator alone; what it computes, on its arguments.
Models are the exception that users expect: like PyTorch's own modules they are made in the default dtype, on
the default device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["factory_defaults", "normal", "uniform", "whole_numbers"]


def uniform(*shape: int, generator: torch.Generator | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1) on the CPU, drawn where the generator is."""
    return torch.rand(shape, generator=generator, dtype=dtype, device=home(generator)).cpu()


def normal(*shape: int, generator: torch.Generator | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers on the CPU, drawn where the generator is."""
    return torch.randn(shape, generator=generator, dtype=dtype, device=home(generator)).cpu()


def whole_numbers(high: int, *shape: int, generator: torch.Generator | None) -> Tensor:
    """Integers from 0 to high - 1 on the CPU, int64, drawn where the generator is."""
    return torch.randint(high, shape, generator=generator, dtype=torch.int64, device=home(generator)).cpu()


def home(generator: torch.Generator | None) -> torch.device:
    """Where a generator draws; the CPU's global one stands in for None."""
    return torch.device("cpu") if generator is None else generator.device


@contextmanager
def factory_defaults() -> Iterator[None]:
    """Make tensors as if nobody had changed the defaults: float32, on the CPU. Also a decorator.

    For what is made once, such as a network whose weights come from a file. The default dtype is the whole
    process's, so code that may run beside other threads names dtype and device instead.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def without_autocast(like: Tensor) -> Any:
    """A context in which products have their arguments' dtype."""
    return torch.autocast(like.device.type, enabled=False) if like.device.type != "meta" else _Nothing()


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
