"""What the tests of attention's Hopper kernels have in common."""

from collections.abc import Iterable

import pytest
import torch
from helpers import emulator
from helpers.attention import Shape
from helpers.levels import EMULATED, PTX

BFLOAT16, FLOAT16 = DTYPES = (torch.bfloat16, torch.float16)
HOPPER_KB = 227
"""KB of shared memory that make the emulator an sm_90 device."""
Case = tuple[Shape, torch.dtype, int]
"""A problem, and the number of multiprocessors."""


def on_backends(emulated: Iterable[Case], of_nvcc: Iterable[Case]) -> pytest.MarkDecorator:
    """Parameters backend, shape, dtype and processors. nvcc's code runs several times slower."""
    return pytest.mark.parametrize(
        ("backend", "shape", "dtype", "processors"),
        [(backend, *case) for backend in EMULATED for case in emulated]
        + [(backend, *case) for backend in PTX for case in of_nvcc],
        ids=lambda x: "x".join(map(str, x[:6])) if isinstance(x, Shape) else str(x),
    )


def launched_hopper() -> bool:
    """Whether the latest launch was of a Hopper kernel: only these use so much shared memory."""
    return emulator.last_shared_bytes() > 200 * 1024
